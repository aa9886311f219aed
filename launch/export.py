"""Write a checkpoint's student as a Hugging Face model.

    python launch/export.py CHECKPOINT OUT
    python launch/export.py checkpoints/LATEST my-student

Needs no GPU and no job; plain `AutoModelForCausalLM.from_pretrained(OUT)` loads the result. Exit
code 2 for a wrong path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step_… directory, or LATEST")
    parser.add_argument("out", type=Path, help="directory to write")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{args.out} exists; remove it or give another name", file=sys.stderr)
        return 2
    from ds_kd.quiet import quiet

    quiet()
    from ds_kd.export import export_checkpoint
    from ds_kd.manifest import CheckpointError

    try:
        export_checkpoint(args.checkpoint.resolve(), args.out)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.out}; load it with AutoModelForCausalLM.from_pretrained({str(args.out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
