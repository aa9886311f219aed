"""Write one page about one or several runs: results, curves, settings, cost and answers.

    python launch/report.py checkpoints --output report.html
    python launch/report.py runs/kd_ratio=0 runs/kd_ratio=0.5 --output report.html
    python launch/report.py checkpoints --evaluation squad.json kl.json --output report.html

A RUN_DIR is a run's checkpoint_dir, or a directory with its metrics.jsonl; an evaluation is what
launch/evaluate.py --output has written. The page is one file that needs no network. Exit code 2 for
a directory without a run, a file without results or a page that cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.process import prepare
from ds_kd.script import run_script


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HTML")
    parser.add_argument("--evaluation", nargs="+", type=Path, default=[], metavar="JSON")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from ds_kd.evaluate.report.page import write_report

    write_report(args.runs, args.output, args.evaluation)
    print(f"wrote {args.output}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
