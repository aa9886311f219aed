"""Write a checkpoint's student as a Hugging Face model.

    python launch/export.py CHECKPOINT OUT
    python launch/export.py checkpoints/LATEST my-student

Needs no GPU and no job; plain `AutoModelForCausalLM.from_pretrained(OUT)` loads the result. Exit
code 2 for a path that is wrong or cannot be written.
"""

from __future__ import annotations

import argparse
import shutil
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
    from safetensors import SafetensorError

    from ds_kd.checkpoint.export import export_checkpoint
    from ds_kd.checkpoint.manifest import CheckpointError
    from ds_kd.errors import first_line

    aside = args.out.with_name(f"{args.out.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        export_checkpoint(args.checkpoint.resolve(), aside)
        aside.rename(args.out)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"{args.out}: cannot be written ({first_line(error)})", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"wrote {args.out}; load it with AutoModelForCausalLM.from_pretrained({str(args.out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
