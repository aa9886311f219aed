"""Show the result of a run: validation before and after, and all models' answers to a question.

    python launch/compare.py --config cfg.yaml
    python launch/compare.py --teacher DIR --before DIR --student DIR \\
        --data validation.jsonl --metrics metrics.jsonl

A run's YAML names its models, its log and its held-out rows, and options override it. `--before` is
the student that the run started from, `--student` the one that it wrote. The rows may be those of
any data set; all models answer one of them. Exit code 2 if something is missing.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script


def show(label: str, text: str) -> None:
    first, rest = f"  {label:<16}", " " * 18
    print(textwrap.fill(text or "(nothing)", 110, initial_indent=first, subsequent_indent=rest))


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.evaluate.comparison import NEW_TOKENS, CompareError, compare, read_lines, summarize

    given = {"teacher": args.teacher, "student before": args.before, "student after": args.student}
    models = {name: path for name, path in given.items() if path}
    metrics, data, absent = args.metrics, args.data, ""
    if args.config is not None:
        from ds_kd.config.load import load
        from ds_kd.recipe import results

        cfg = load(args.config, args.overrides, tuple(args.allow_targets))
        if metrics is None and not (metrics := results.log_of(cfg)).exists():
            raise CompareError(
                f"no log at {metrics}; give the overrides that the run had "
                "(checkpoint.checkpoint_dir=…), or --metrics"
            )
        if args.student is None:
            absent = results.describe_without_final(cfg)
        if not absent:
            data = data or results.held_out_samples(cfg)
            models = results.models_of(cfg, models)
    if metrics is not None:
        print("\n".join(summarize(read_lines(metrics))), flush=True)
    if absent:
        raise CompareError(absent)
    told = compare(models, data, args.row)
    print(f"student: {models['student after']}\n")
    print(f"a held-out question, answered greedily in at most {NEW_TOKENS} tokens")
    for label, text in told:
        show(label, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", metavar="YAML", help="of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="YAML values the run was started with"
    )
    parser.add_argument("--allow-targets", action="append", default=[], metavar="PREFIX")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--student", type=Path, help="the distilled model")
    parser.add_argument("--before", type=Path, help="the model distillation started from")
    parser.add_argument("--data", type=Path, help="held-out rows")
    parser.add_argument("--metrics", type=Path, help="the run's metrics.jsonl")
    parser.add_argument("--row", type=int, default=0, help="of --data, to ask about; from 0")
    args = parser.parse_intermixed_args(argv)
    missing = [f"--{name}" for name in ("teacher", "student", "data") if not getattr(args, name)]
    if args.config is None and missing:
        parser.error(f"give --config, or {', '.join(missing)}")
    if args.row < 0:
        parser.error(f"--row: got {args.row}, expected a number ≥ 0")
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
