"""Write a checkpoint's student as a Hugging Face model.

    python launch/export.py CHECKPOINT OUT
    python launch/export.py checkpoints/LATEST my-student

It needs no GPU. `AutoModelForCausalLM.from_pretrained(OUT)` loads the result. Exit code 2 for a
path that is wrong or cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step_… directory, or LATEST")
    parser.add_argument("out", type=Path, help="directory to write")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.checkpoint.export import export_to

    # DeepSpeed prints a line for each thing it does, and progress bars; its errors are raised.
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        export_to(args.checkpoint, args.out)
    print(f"wrote {args.out}; load it with AutoModelForCausalLM.from_pretrained({str(args.out)!r})")


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
