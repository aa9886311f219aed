"""Measure what ranks exchange in a step: teacher batch by batch or in a window, gradients each or
once.

    torchrun --nproc-per-node 2 benchmarks/speed/exchange.py --teacher DIR --student DIR --data FILE

The ways take the same steps in turn (A B C A B C …); the first round is thrown away. Each step is
told when it is taken, with its loss. At the end are told, of rank 0, medians of the seconds of a
step and of its parts, the process's CPU seconds, and bytes that collectives gathered and reduced.
With the quickstart's models these are 18,432 tokens, some minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import add_run, make_parser
from benchmarks.traffic import count_bytes

#: Way → (whether the teacher has its window, whether gradients are exchanged once).
WAYS = {"batch by batch": (False, False), "window": (True, False), "window, once": (True, True)}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run(parser, "rows with messages", pack=512)
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each way")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step on one rank")
    args = parser.parse_args()
    if args.rounds < 1 or args.micro_batches < 2:
        parser.error("--rounds must be at least 1 and --micro-batches at least 2, for a window")
    return args


def build(args: argparse.Namespace, directory: str) -> Any:
    """Return the trainer of a run on all ranks of the launcher, which logs into a directory."""
    import os

    import ds_kd

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    values = {
        "model": {"pretrained_model_name_or_path": args.student, "torch_dtype": args.dtype},
        "teacher_model": {"pretrained_model_name_or_path": args.teacher, "torch_dtype": args.dtype},
        "dataset": {"_target_": "ds_kd.data.chat.ChatDataset", "path_or_dataset_id": args.data},
        "step_scheduler": {
            "global_batch_size": ranks * args.micro_batches,
            "local_batch_size": 1,
            "num_epochs": 1000,
        },
        "packed_sequence": {"packed_sequence_size": args.pack},
        "optimizer": {"lr": 1e-6},
        "checkpoint": {"enabled": False},
        "tensorboard": {"enabled": False, "log_dir": directory},
    }
    return ds_kd.build(ds_kd.load_config(values))


def take(trainer: Any, step: list[dict[str, Any]]) -> dict[str, float]:
    """Return the costs of a step, and its loss on rank 0."""
    seen: dict[str, float] = {}
    if trainer.metrics is not None:
        trainer.metrics.train = lambda _, values: seen.update(values)
    wall, cpu = time.perf_counter(), time.process_time()
    with count_bytes() as counts:
        trainer._step(step, wall)
    cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    cost |= {kind: sum(counts[kind].values()) for kind in ("gathered", "reduced")}
    parts = {name: seen.get(f"time/{name}", 0.0) for name in ("teacher", "backward")}
    return {**cost, **parts, "loss": seen.get("train_loss", 0.0)}


def compare(trainer: Any, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Take the steps of every way in turn, tell each on rank 0, and return their costs by way."""
    from ds_kd.parallel.accumulation import Once

    window = trainer.teacher.window
    batches = trainer.batches.after(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for k in range(rounds + 1):
        step = next(batches)
        for name, (has_window, once) in WAYS.items():
            trainer.teacher.window = window if has_window else None
            trainer.reduce_once = Once(always=once)
            cost = take(trainer, step)
            found[name].append(cost)
            if trainer.world.is_main:
                told = f"{cost['wall']:.2f} s, loss {cost['loss']:.4f}"
                print(f"round {k}/{rounds}, {name}: {told}", flush=True)
    return found


def run(args: argparse.Namespace) -> None:
    from ds_kd.quiet import quiet

    quiet()
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(args, directory)
        found = compare(trainer, args.rounds)
        is_main = trainer.world.is_main
        trainer.close()
    for name, each in found.items() if is_main else ():
        names = ("wall", "cpu", "teacher", "backward", "gathered", "reduced")
        told = {n: round(statistics.median(e[n] for e in each[1:]), 3) for n in names}
        print(json.dumps({"way": name, **told}), flush=True)


def main() -> int:
    args = parse()
    from ds_kd.script import run_script

    return run_script(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
