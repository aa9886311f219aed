"""The ways in which ds_kd's student writes: a whole copy on each rank, or its shards.

    torchrun --nproc-per-node 2 benchmarks/rollouts/ways.py --teacher DIR --student DIR --data FILE

Both write the same texts in turn (A B A B …), and the first round is thrown away. Told on rank 0
are medians of wall time and of all ranks' CPU time, and whether the texts are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import add_output, add_run, make_parser


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run(parser, "rows with messages", pack=2048)
    option = parser.add_argument
    option("--prompts", type=int, default=8, help="of a step, over all ranks")
    option("--new-tokens", type=int, default=16, help="limit of an answer")
    option("--rounds", type=int, default=2, help="timed rounds of each way")
    add_output(parser)
    return parser.parse_args()


def build(args: argparse.Namespace, directory: str) -> tuple[Any, list[Any]]:
    """Return the trainer of a run, and the prompts and draws of its first step."""
    from benchmarks.rollouts.trainers import Job, build_ours

    pair = (args.teacher, args.student, args.data)
    trainer = build_ours(
        Job(*pair, args.prompts, args.prompts, args.new_tokens, 1.0, 1, args.pack), directory
    )
    asked: list[Any] = []
    write = trainer.batches._write

    def note(prompts: Any, draws: Any) -> Any:
        asked.extend([prompts, draws])
        return write(prompts, draws)

    trainer.batches._write = note
    next(trainer.batches.after(0))
    trainer.batches._write = write
    return trainer, asked


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each way, of all ranks of the launcher."""
    from ds_kd.models.generation.writer import Writer
    from ds_kd.parallel.world import sum_over

    with tempfile.TemporaryDirectory() as directory:
        trainer, asked = build(args, directory)
        copy, world = trainer.batches._write, trainer.world
        shards = Writer(copy.engine, None, copy.how, copy.ends, copy.room, world)
        found: dict[str, list[Any]] = {"replica": [], "sharded": []}
        for _ in range(args.rounds + 1):
            for name, write in (("replica", copy), ("sharded", shards)):
                wall, cpu = time.perf_counter(), time.process_time()
                texts = write(*asked)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                cpu = float(sum_over([cpu], world.everyone)[0])
                found[name].append((wall, cpu, [text.tokens for text in texts]))
        trainer.close()
    first = found["replica"][0][2]
    return [describe(name, each, first) for name, each in found.items()]


def describe(name: str, rounds: list[Any], first: list[list[int]]) -> dict[str, Any]:
    """Return the row of a way; `first` are the texts that all rounds should give."""
    wall, cpu = (statistics.median(each[k] for each in rounds[1:]) for k in (0, 1))
    tokens = sum(map(len, first))
    row = {"way": name, "texts": len(first), "new tokens": tokens, "wall s": wall, "CPU s": cpu}
    return {
        **row,
        "CPU ms a token": 1000 * cpu / tokens,
        "texts equal": all(each[2] == first for each in rounds),
    }


def main() -> int:
    args = parse()
    from benchmarks import measure
    from ds_kd.quiet import quiet

    quiet()
    rows = compare(args)
    if int(os.environ.get("RANK", "0")) == 0:
        measure.write(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
