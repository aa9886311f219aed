"""Arguments that several benchmarks take. It imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Real rows in SQuAD's schema, where the machine has them.
SQUAD = ROOT.parent / "shared" / "data" / "squad_train.jsonl"


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser whose `--help` shows a benchmark's docstring as it is written."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_pair(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add a teacher and a student, the quickstart's unless others are given, and the rounds."""
    quickstart = ROOT / "quickstart"
    parser.add_argument("--teacher", type=Path, default=quickstart / "teacher")
    parser.add_argument("--student", type=Path, default=quickstart / "student")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed steps of each")


def add_run(parser: argparse.ArgumentParser, rows: str, pack: int) -> None:
    """Add what a run is built from.

    Args:
        rows: what the rows of `--data` have.
        pack: default of `--pack`, tokens.
    """
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True, help=rows)
    parser.add_argument("--pack", type=int, default=pack, help="tokens of a pack; 0 pads samples")
    parser.add_argument("--dtype", default="fp32")


def check_pair(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a sentence if a model of `add_pair` is not there."""
    for path in (args.teacher, args.student):
        if not (path / "config.json").is_file():
            parser.error(f"no model in {path}; bash launch/quickstart.sh makes it")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the place of the tables that `measure.write` writes."""
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
