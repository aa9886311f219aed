"""Evaluate models: HellaSwag, SQuAD, perplexity, or the distance to a teacher.

    python launch/evaluate.py --model DIR --task hellaswag --data validation.jsonl
    python launch/evaluate.py --model BEFORE --model AFTER --task squad --data squad.jsonl
    python launch/evaluate.py --model DIR --teacher DIR --task kl --data validation.jsonl
    torchrun --nproc-per-node 8 launch/evaluate.py … / deepspeed launch/evaluate.py …

Several ranks share the samples out; the numbers are those of one. The differences of several models
are told too, with their intervals. With --output the results are written as JSON, and what each
sample gave beside it: the same command goes on where it was stopped. Exit code 2 for a user's
mistake.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import positive
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script

DTYPES = ("auto", "bf16", "fp32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", action="append", required=True, metavar="DIR", help="or a hub id; several")
    option("--teacher", metavar="DIR", help="to which --task kl compares")
    option("--task", required=True, metavar="NAME", help="hellaswag, squad, perplexity or kl")
    option("--data", required=True, metavar="FILE", help="rows; a pattern or a hub id too")
    option("--limit", type=positive(int), metavar="N", help="take only the first N rows")
    option("--output", type=Path, metavar="JSON", help="write the results there")
    option(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights; auto: float32 on a CPU, on a GPU that of the files",
    )
    option("--batch-size", type=positive(int), metavar="N", help="the most samples of a batch")
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args(argv)
    if args.task == "kl" and args.teacher is None:
        parser.error("--task kl compares with a teacher: give --teacher DIR")
    if len({*map(os.path.normpath, args.model)}) < len(args.model):
        parser.error("--model: the same model is given twice")
    return args


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.parallel.world import start_or_alone, stop
    from ds_kd.recipe.tasks.evaluation import Options, evaluate, find_task

    task = find_task(args.task)
    options = Options(args.data, args.limit, args.dtype, args.batch_size, args.output)
    world = start_or_alone()
    table = evaluate(args.model, args.teacher, task, options, world)
    stop()
    if world.is_main:
        print(table)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
