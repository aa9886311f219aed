"""Print a commented YAML to start from.

    python launch/new_config.py --student DIR --teacher DIR --data FILE --gpus 8 > cfg.yaml
    python launch/new_config.py … --gpus 64 --nodes 8 --gpu-memory 80GB --host-memory 2TB > cfg.yaml

Models and data are directories, files or hub ids. The YAML has the batch sizes, place of the
teacher, activation checkpointing and offload whose step takes least time among all whose memory
plan fits, and says why; steps and validation follow the number of rows. Without --validation a
share of the rows is kept out of training and validated on. Exit code 2 where something named is
wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import positive
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="new_config.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --ranks would be taken for --ranks-per-node
    )
    parser.add_argument("--student", required=True, metavar="MODEL")
    parser.add_argument("--teacher", required=True, metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="ROWS")
    parser.add_argument("--validation", metavar="ROWS", help="held-out rows (a share of --data)")
    parser.add_argument(
        "--columns", metavar="NAMES", help="of the rows: QUESTION,ANSWER or CONTEXT,QUESTION,ANSWER"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja, for a model without one")
    parser.add_argument("--gpus", type=positive(int), default=1, metavar="N", help="ranks")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of each, if not what --gpu has")
    parser.add_argument("--host-memory", metavar="SIZE", help="of one node, for what is offloaded")
    number = positive(int)
    parser.add_argument("--ranks-per-node", type=number, metavar="N", help="share it (8)")
    parser.add_argument("--nodes", type=number, metavar="N", help="that the GPUs are divided over")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="times are of it (h100)")
    parser.add_argument(
        "--network", metavar="NAME", help="ndr, or Gbit/s: of each GPU between nodes"
    )
    args = parser.parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.plan.memory import Machine
    from ds_kd.plan.new_config.starter import Rows, write_starter
    from ds_kd.plan.step.cluster import bytes_of, divide_over_nodes, make_cluster

    host = args.host_memory and bytes_of(args.host_memory, "--host-memory")
    together = args.ranks_per_node or 8
    if args.nodes is not None:
        together = divide_over_nodes(args.gpus, args.nodes, args.ranks_per_node, "--gpus")
    cluster = make_cluster(args.gpu, args.gpus, together, args.network)
    assert cluster is not None
    room = cluster.gpu.memory if args.gpu_memory is None else bytes_of(args.gpu_memory)
    machine = Machine(room, host, cluster.per_node)
    rows = Rows(args.data, args.validation, args.columns, args.chat_template)
    text, warnings = write_starter((args.student, args.teacher), rows, machine, cluster)
    print(text, end="")
    for line in warnings:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    prepare()
    sys.exit(main())
