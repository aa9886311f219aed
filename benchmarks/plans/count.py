"""Count what one micro-batch costs a GPU, without one (`cost.py`).

    python benchmarks/plans/count.py                 Llama 3.2 3B → 1B, one sample of 4,096 tokens
    python benchmarks/plans/count.py --length 8192 --temperature 2 --divergence jsd
    python benchmarks/plans/count.py --samples 24    the same tokens, as a pack of so many samples
    python benchmarks/plans/count.py --pair 70B-8B --ranks 64 --micro-batches 8 --window 8
    python benchmarks/plans/count.py --table         the table of docs/performance.md

With the rates of a named GPU (`ds_kd/plan/hardware.py`) and the exchange between ranks
(`ds_kd/plan/step`) this gives the time of a step and its MFU (`predict.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser


def parse(pairs: tuple[str, ...]) -> argparse.Namespace:
    from ds_kd.config.signatures import divergences_by_name
    from ds_kd.plan.hardware import GPUS

    parser = make_parser(__doc__)
    parser.add_argument("--pair", default="3B-1B", choices=pairs, help="teacher and student")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--samples", type=int, default=1, help="of a pack of so many tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    names = sorted({*divergences_by_name()} - {"hidden_states"})
    parser.add_argument("--divergence", default="forward_kl", choices=names)
    parser.add_argument("--gpu", default="h100", choices=GPUS)
    parser.add_argument("--ranks", type=int, default=1, help="up to 8, or nodes of 8")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a rank in a step")
    parser.add_argument("--window", type=int, default=1, help="micro-batches the teacher takes")
    parser.add_argument("--copies", type=int, default=1, help="ranks that share a copy of weights")
    parser.add_argument("--table", action="store_true", help="print docs/performance.md's table")
    args = parser.parse_args()

    for name in ("length", "samples", "ranks", "micro_batches", "window", "copies"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.samples > args.length:
        parser.error("--samples: there are more of them than tokens (--length)")
    if args.ranks > 8 and args.ranks % 8:
        parser.error("--ranks must be at most 8 or a multiple of 8, whole nodes")
    if args.ranks % args.copies:
        parser.error("--copies must divide --ranks")
    if args.micro_batches % args.window:
        parser.error("--window must divide --micro-batches")
    return args


def main() -> None:
    from benchmarks.plans.cost import describe
    from benchmarks.plans.predict import (
        PAIRS,
        Run,
        count_pair,
        describe_time,
        make_loss,
        make_table,
    )
    from ds_kd.plan.hardware import GPUS

    args = parse(PAIRS)
    if args.table:
        print("\n".join(make_table(GPUS[args.gpu])))
        return
    each, more = divmod(args.length, args.samples)
    lengths = [each + (k < more) for k in range(args.samples)]
    try:
        cost = count_pair(args.pair, lengths, make_loss(args.divergence, args.temperature))
    except NotImplementedError:
        sys.exit(f"{args.divergence} asks for numbers on its way, which meta tensors do not have")
    except ValueError as error:  # of an argument of the loss
        sys.exit(str(error))
    run = Run(GPUS[args.gpu], args.ranks, args.micro_batches, args.window, args.copies)
    print("\n".join([*describe(cost), "", *describe_time(args.pair, cost, lengths, run)]))


if __name__ == "__main__":
    main()
