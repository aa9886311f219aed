"""A step on the student's own texts, by ds_kd and by others, on the same prompts.

    python benchmarks/rollouts/steps.py --teacher DIR --student DIR --data FILE
    python benchmarks/rollouts/steps.py … --cut 2 --greedy    micro-batches of two, likeliest tokens

Every contender is a process of its own; they take the same steps in turn (A B A B …), and the first
one is thrown away. Told are medians of a step's CPU and wall time, the peak of the process, the
tokens of prompts and answers, and of the first step, where all have the same weights, the loss and
a digest of the texts: under another `--cut` they stay the same where a step is exact.

`trl` is TRL's DistillationTrainer; it needs TRL on the path (`pip install --no-deps --target DIR
trl==1.16.0`, PYTHONPATH=DIR). `opsd` is the step of DeepSpeedExamples' training/opsd, put together
from DeepSpeed's own rollout engine and loss, under ZeRO-0 as in its smoke test; `opsd_zero3` is the
same in shards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import add_output, add_run, make_parser
from benchmarks.rollouts.trainers import CONTENDERS, Gate, Job


def work(name: str, job: Job, pipe: Any, threads: int) -> None:
    """Take a contender's steps in this process."""
    import torch

    from ds_kd.quiet import quiet

    os.dup2(2, 1)  # a trainer's own lines are no part of the table
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    quiet()
    CONTENDERS[name](job, Gate(pipe))


def take_in_turn(names: list[str], job: Job, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Return the costs of each contender's steps; one that ends early has fewer."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=work, args=(name, job, other, threads)))
        processes[-1].start()
        other.close()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for step, name in itertools.product(range(job.steps), names):
        try:
            pipes[name].send("step")
            found[name].append(pipes[name].recv())
        except (EOFError, OSError):
            continue
        print(f"step {step}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.close()
        process.join()
    return found


def describe(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a contender."""
    if len(steps) < 2:
        return {"contender": f"{name} took no second step"}
    first, timed = steps[0], steps[1:]
    row: dict[str, Any] = {"contender": name}
    for key in ("cpu", "wall"):
        row[f"{key} s"] = statistics.median(step[key] for step in timed)
    row["peak GiB"] = steps[-1]["peak"]
    for key in ("prompts", "answers"):
        row[f"{key}, tokens"] = sum(step[key] for step in timed) / len(timed)
    return {**row, "first loss": f"{first['loss']:.6f}", "first texts": first["texts"]}


def parse() -> tuple[argparse.Namespace, Job]:
    parser = make_parser(__doc__)
    add_run(parser, "rows with messages", pack=2048)
    option = parser.add_argument
    option("--contenders", nargs="+", choices=CONTENDERS, default=["ds_kd", "trl", "opsd"])
    option("--prompts", type=int, default=4, help="of a step")
    option("--cut", type=int, help="prompts of a micro-batch, not packed; default: all of a step")
    option("--new-tokens", type=int, default=24, help="limit of an answer")
    option("--greedy", action="store_true", help="take the likeliest token each time")
    option("--rounds", type=int, default=3, help="timed steps of each")
    option("--threads", type=int, default=1, help="of each contender")
    add_output(parser)
    args = parser.parse_args()
    cut = args.cut or args.prompts
    if args.prompts % cut or args.rounds < 1:
        parser.error("--cut must divide --prompts, and --rounds be at least 1")
    job = Job(
        args.teacher, args.student, args.data, args.prompts, cut, args.new_tokens,
        0.0 if args.greedy else 1.0, args.rounds + 1, 0 if args.cut else args.pack,
    )  # fmt: skip
    return args, job


def main() -> int:
    args, job = parse()
    from benchmarks import measure

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    found = take_in_turn(args.contenders, job, args.threads)
    measure.write([describe(name, steps) for name, steps in found.items()], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
