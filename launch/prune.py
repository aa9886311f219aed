"""Make a student by depth pruning: keep some of a model's layers and everything else.

    python launch/prune.py --teacher DIR_OR_HUB_ID --keep-layers 18 --output DIR
        18 layers, evenly spaced, first and last included
    python launch/prune.py … --keep-layers 18 --calibration train.jsonl
        the 18 layers without which the predictions for these rows would move most
    python launch/prune.py … --keep-layers 0,5,11
        these, counted from 0

Works on any decoder-only model of transformers that keeps its layers in one ModuleList. The result
is loaded again and must give the pruned model's logits. Exit code 2 for a user's mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="prune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="Hugging Face model: directory or hub id")
    parser.add_argument(
        "--keep-layers", required=True, metavar="N|A,B,…", help="how many layers, or which"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--calibration", type=Path, metavar="ROWS", help="rows by which to choose the layers"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto keeps the teacher's"
    )
    args = parser.parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.models.prune import write_pruned

    described = write_pruned(
        args.teacher, args.keep_layers, args.output, DTYPES[args.dtype], args.calibration
    )
    print(f"{described}\nwrote {args.output}")


if __name__ == "__main__":
    prepare()
    sys.exit(main())
