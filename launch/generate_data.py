"""Have a teacher answer the prompts of a file, and keep the answers as a data set.

    python launch/generate_data.py --teacher DIR --data prompts.jsonl --output answers.jsonl
    python launch/generate_data.py … --temperature 0.7 --samples 4        four draws for each prompt
    torchrun --nproc-per-node 8 launch/generate_data.py …

Prompts are `messages` or `conversations`, without the assistant's turn if they end in one, SQuAD's
questions, or texts under `prompt`; the teacher's chat template opens its answer, if it has one. The
same data sets read the rows that are written, so that `kd_ratio: 0` distils from the answers alone.
Every draw follows from --seed, the row and its number; the same command goes on where it was
stopped. Answers of another teacher or other settings are never replaced. Exit code 2 for a user's
mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import positive, read_seed
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script

DTYPES = ("auto", "bf16", "fp32")


def read_temperature(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else positive(float)(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--teacher", required=True, metavar="DIR", help="or a hub id")
    option("--data", required=True, metavar="FILE", help="prompts; a pattern or a hub id too")
    option("--output", required=True, type=Path, metavar="FILE", help="the .jsonl to write")
    option("--limit", type=positive(int), metavar="N", help="take only the first N rows")
    option("--samples", type=positive(int), default=1, metavar="N", help="answers to each prompt")
    option("--max-new-tokens", type=positive(int), default=256, metavar="N", help="256 by default")
    option(
        "--temperature",
        type=read_temperature,
        default=0.0,
        metavar="T",
        help="of sampling; 0, the default, takes the likeliest token",
    )
    option("--top-p", type=positive(float, 1), default=1.0, metavar="P", help="1 by default")
    option("--seed", type=read_seed, default=0, metavar="N", help="of sampling; 0 by default")
    option("--plain", action="store_true", help="leave the chat template out")
    option("--dtype", choices=DTYPES, default="auto", help="of the weights; see evaluate.py")
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args(argv)
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples: at --temperature 0 all answers to a prompt are the same")
    if args.output.suffix != ".jsonl":
        parser.error(f"--output: got {args.output}, expected a name that ends in .jsonl")
    return args


def run(args: argparse.Namespace) -> None:
    quiet()
    from ds_kd.models.generation.sampling import Sampling
    from ds_kd.parallel.world import start_or_alone, stop
    from ds_kd.recipe.offline.answers import Options, generate_data

    how = Sampling(args.max_new_tokens, args.temperature, args.top_p)
    options = Options(
        args.data,
        args.output,
        args.samples,
        how,
        args.seed,
        args.limit,
        args.dtype,
        args.plain,
    )
    world = start_or_alone()
    told = generate_data(args.teacher, options, world)
    stop()
    if world.is_main:
        print(*told, sep="\n")


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
