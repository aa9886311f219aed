"""A step whose teacher is read from a cache against one whose teacher runs, on the same rows.

    python benchmarks/speed/cached.py --teacher DIR --student DIR --data squad_train.jsonl

Both take the same steps of one student in turn (A B A B …), each with the rows of the same
micro-batches; the cache was filled before, so that these are steps of a second epoch. The first
round is thrown away. Told are medians of wall time and of the process's CPU time, and the largest
relative difference of a loss.
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


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    option = parser.add_argument
    add_run(parser, "rows in SQuAD's schema", pack=0)
    option("--steps", type=int, default=6)
    option("--samples", type=int, default=8, help="of a step")
    return parser.parse_args()


def build(args: argparse.Namespace, directory: Path) -> tuple[Any, Any]:
    """Return the trainer of a run that fills a cache, and its teacher in an engine."""
    import ds_kd

    data = {"_target_": "ds_kd.data.squad.make_squad_dataset", "dataset_name": args.data}
    rows = args.steps * args.samples * (12 if args.pack else 1)
    values = {
        "model": {"pretrained_model_name_or_path": args.student, "torch_dtype": args.dtype},
        "teacher_model": {"pretrained_model_name_or_path": args.teacher, "torch_dtype": args.dtype},
        "teacher": {"kind": "cached", "fill": True, "directory": str(directory / "cache")},
        "dataset": {**data, "limit_dataset_samples": rows},
        "step_scheduler": {
            "global_batch_size": args.samples,
            "local_batch_size": 1 if args.pack else args.samples,
        },
        "packed_sequence": {"packed_sequence_size": args.pack},
        "optimizer": {"lr": 1e-5},
        "checkpoint": {"enabled": False},
        "tensorboard": {"enabled": False, "log_dir": str(directory)},
        "dist_env": {"backend": "gloo"},
    }
    trainer = ds_kd.build(ds_kd.load_config(values))
    return trainer, trainer.teacher.teacher


def take(trainer: Any, teacher: Any, micro_batches: list[dict[str, Any]]) -> dict[str, float]:
    """Return wall and CPU seconds of a step, and its loss."""
    seen: dict[str, float] = {}
    trainer.teacher, trainer.metrics.train = teacher, lambda _, values: seen.update(values)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer._step(micro_batches, wall)
    cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {**cost, "loss": seen["kd_loss"], "teacher": seen["time/teacher"]}


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        trainer, live = build(args, Path(name))
        cached = trainer.teacher.cached
        batches = trainer.batches.batches.after(0)
        steps = [next(batches) for _ in range(args.steps)]
        for batch in (batch for step in steps for batch in step):
            trainer.teacher.fill(batch)
        cached.store.flush()

        # The loss of one set of weights is compared before a step, as steps change them.
        found: dict[str, list[dict[str, float]]] = {"resident": [], "cached": []}
        for step in steps:
            for label, teacher in (("resident", live), ("cached", cached)):
                found[label].append(take(trainer, teacher, step))
        differences = compare(trainer, live, cached, steps)
        size = sum(path.stat().st_size for path in Path(name, "cache").glob("part-*"))
        rows = len(cached.store)
        trainer.close()
    told: dict[str, Any] = {"rows": rows, "bytes": size, "largest difference": max(differences)}
    for label, each in found.items():
        told[label] = {
            k: round(statistics.median(e[k] for e in each[1:]), 3)
            for k in ("wall", "cpu", "teacher")
        }
    for k in ("wall", "cpu"):
        told[f"{k} ratio"] = round(told["resident"][k] / told["cached"][k], 3)
    print(json.dumps(told))


def compare(trainer: Any, live: Any, cached: Any, steps: list[Any]) -> list[float]:
    """Return the relative difference of each micro-batch's loss for the same weights."""
    import torch

    found = []
    with torch.no_grad():
        for batch in (batch for step in steps for batch in step):
            losses = [float(trainer.student(batch, each(batch))[0]) for each in (live, cached)]
            found.append(abs(losses[0] - losses[1]) / losses[0])
    return found


if __name__ == "__main__":
    main()
