"""Print the plan of a run: parameters, steps, memory, FLOPs. Loads no weights, starts nothing.

    python launch/plan.py --config cfg.yaml --ranks 8 --gpu-memory 80GB [key.sub=value …]
    python launch/plan.py --config cfg.yaml --ranks 8 --host-memory 1TB --length 2048
    python launch/plan.py --config cfg.yaml --gpu h100 --ranks 64 --nodes 8       the time of a step

Only the models' config.json is needed. If the run does not fit, the plan says so and names the
smallest number of ranks that does. Exit code 2 if the config or the command is wrong, else 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import parse_run, positive, run_parser
from ds_kd.config.load import load
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script


def parse(argv: list[str]) -> argparse.Namespace:
    parser = run_parser("plan.py", __doc__)
    option = parser.add_argument
    option("--ranks", type=positive(int), metavar="N", help="of the run")
    option("--gpu-memory", metavar="SIZE", help="of a rank, what has to fit: 80GB")
    option("--host-memory", metavar="SIZE", help="of a node, where offload goes: 1TB")
    option("--ranks-per-node", type=positive(int), metavar="N", help="that share that memory")
    option("--gpu", metavar="NAME", help="h100, for its memory and the time of a step at best")
    option("--nodes", type=positive(int), metavar="N", help="that the ranks are divided over")
    option("--network", metavar="NAME", help="ndr, or Gbit/s: of each GPU between nodes")
    option("--length", type=positive(int), metavar="N", help="tokens of a sample; else measured")
    option("--mfu", type=positive(float, 1), default=0.4, help="share of the peak, such as 0.4")
    option("--tflops", type=positive(float), default=989.0, help="that peak (an H100's)")
    return parse_run(parser, argv)


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.plan.dry_run import plan_of

    cfg = load(args.config, args.overrides, tuple(args.allow_targets), config_only=True)
    with cfg.source.add_places():
        print(
            plan_of(
                cfg,
                args.ranks,
                args.gpu_memory,
                args.host_memory,
                args.ranks_per_node,
                args.length,
                args.mfu,
                args.tflops,
                args.gpu,
                args.nodes,
                args.network,
            )
        )


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
