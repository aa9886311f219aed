"""Have a student write text, or talk to it.

    python launch/generate.py --model checkpoints/final --prompt "Translate to French: I love it!"
    python launch/generate.py --model checkpoints/final --chat
    python launch/generate.py --model checkpoints/final --chat --prompt "What is a list?"

`--prompt` alone goes on from the text as it stands; with `--chat` the text is a user's message, in
the tokenizer's chat template. `--chat` alone talks until Ctrl-D, and reads one message a line where
standard input is a file. Text appears as it is written. Exit code 2 for a directory without a
model, a tokenizer without a chat template or a prompt that is too long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import positive, read_seed
from ds_kd.errors import MachineError, first_line
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script


def read_temperature(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else positive(float)(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help="the student, such as checkpoints/final")
    option("--prompt", metavar="TEXT", help="what to go on from")
    option("--chat", action="store_true", help="use the chat template; alone: talk")
    option("--max-new-tokens", type=positive(int), default=256, metavar="N", help="256 by default")
    option(
        "--temperature",
        type=read_temperature,
        default=0.0,
        metavar="T",
        help="of sampling; 0, the default, takes the likeliest token",
    )
    option("--seed", type=read_seed, default=0, metavar="N", help="of sampling; 0 by default")
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        parser.error("give --prompt TEXT, --chat, or both")
    return args


def run(args: argparse.Namespace) -> None:
    quiet()
    import ds_kd

    student = ds_kd.load_student(args.model)
    if args.prompt is not None:
        write(student, args.prompt, args)
        return
    student.encode("", chat=True)  # refused before the first question is typed
    turns: list[dict[str, str]] = []
    for question in read_questions():
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": write(student, turns, args)})


def write(student: Any, prompt: Any, args: argparse.Namespace) -> str:
    """Print the answer as it is written, and return it."""
    text = student(
        prompt,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        on_text=lambda piece: print(piece, end="", flush=True),
    ).text
    print(flush=True)
    return str(text)


def read_questions() -> Iterator[str]:
    """Yield what the user types, line by line, without empty lines, until the input ends."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        print(sign, end="", flush=True)
        try:
            line = sys.stdin.readline()
        except (OSError, ValueError) as error:  # a directory, or no text
            raise MachineError(f"standard input cannot be read: {first_line(error)}") from None
        if not line:
            print(end="\n" if sign else "")
            return
        if line.strip():
            yield line.strip()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
