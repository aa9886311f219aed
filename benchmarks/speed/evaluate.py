"""Time HellaSwag by launch/evaluate.py and by lm-evaluation-harness, side by side on the same rows.

    python benchmarks/speed/evaluate.py --model DIR --data hellaswag.jsonl [--limit 200]
    python benchmarks/speed/evaluate.py … --side ours|harness    one of them alone

Both load the model in float32 before the clocks start; the harness comes with requirements-dev.txt.
Prints seconds, seconds of the processor (which other work on the machine changes less), accuracies,
and the largest difference of a log-likelihood.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.arguments import make_parser
from ds_kd.quiet import quiet


def start_clocks() -> Callable[[], dict[str, Any]]:
    """Return what reads the seconds since this call."""
    wall, cpu = time.monotonic(), time.process_time()
    return lambda: {"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}


def time_harness(model: str, data: str, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Return the seconds, accuracies and log-likelihoods of lm-evaluation-harness."""
    from tests import harness

    loaded = harness.model_of(model, batch_size)
    harness.hellaswag(loaded, data, 1)
    read = start_clocks()
    found = harness.hellaswag(loaded, data, limit)
    return read() | found


def time_ours(model: str, data: str, limit: int | None) -> dict[str, Any]:
    """Return the same of this package."""
    from ds_kd.evaluate.journal import Journal
    from ds_kd.evaluate.run import load_items, plan_batches, run_task, tokens_of_batch
    from ds_kd.evaluate.tasks.builtin import BUILTIN
    from ds_kd.parallel.world import World
    from ds_kd.recipe.tasks.evaluation import Loaded

    world = World(0, 1, torch.device("cpu"), "gloo")
    task = BUILTIN["hellaswag"]
    loaded = Loaded("--model", model, "fp32", world)
    subject = loaded.load(None, 0)
    read = start_clocks()
    items = load_items(task, data, limit, loaded.encoder).items
    batches = plan_batches(task, items, tokens_of_batch("cpu"), len(items))
    journal = Journal(None, "", {}, [], 0)
    records = run_task(task, lambda: subject, items, batches, world, journal, "ours")
    return read() | {
        "acc": sum(record["acc"] for record in records) / len(records),
        "acc_norm": sum(record["acc_norm"] for record in records) / len(records),
        "log_likelihoods": [record["log_likelihoods"] for record in records],
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness, in endings")
    parser.add_argument("--side", choices=("both", "ours", "harness"), default="both")
    args = parser.parse_args()
    quiet()
    found: dict[str, Any] = {}
    if args.side != "harness":
        found["ours"] = time_ours(args.model, args.data, args.limit)
    if args.side != "ours":
        found["harness"] = time_harness(args.model, args.data, args.limit, args.batch_size)
    for name, of in found.items():
        print(
            f"{name}: {of['seconds']:.1f} s, {of['cpu']:.1f} s of the processor, acc {of['acc']}, "
            f"acc_norm {of['acc_norm']}"
        )
    if len(found) == 2:
        ours, theirs = found["ours"], found["harness"]
        pairs = zip(ours["log_likelihoods"], theirs["log_likelihoods"], strict=True)
        worst = max(abs(a - b) for us, them in pairs for a, b in zip(us, them, strict=True))
        print(f"ratio {theirs['cpu'] / ours['cpu']:.2f}, log-likelihoods within {worst:.1e}")


if __name__ == "__main__":
    main()
