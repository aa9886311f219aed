"""Print a commented YAML to start from.

    python launch/new_config.py --student DIR --teacher DIR --data FILE --gpus 8 > cfg.yaml

Models and data are directories, files or hub ids. Batch size, activation checkpointing and offload
are the ones whose memory plan fits. Exit code 2 where something named is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.config.components import ConfigError
from ds_kd.quiet import quiet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="new_config.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--student", required=True, metavar="MODEL")
    parser.add_argument("--teacher", required=True, metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="ROWS")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks")
    parser.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="of each (80GB)")
    args = parser.parse_args(argv)
    if args.gpus < 1:
        parser.error(f"--gpus: got {args.gpus}, expected a number ≥ 1")
    quiet()
    from ds_kd.plan.dry_run import bytes_of
    from ds_kd.plan.starter import starter

    try:
        room = bytes_of(args.gpu_memory)
        print(starter(args.student, args.teacher, args.data, args.gpus, room), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
