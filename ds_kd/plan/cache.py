"""Estimate what a teacher's cache takes: bytes on disk, memory of the head, time to make it."""

from __future__ import annotations

from pathlib import Path

from ds_kd.config.names import CACHE_RECORD
from ds_kd.config.schema import RunConfig
from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.evaluate.progress import format_seconds
from ds_kd.parallel.world import World
from ds_kd.plan import memory
from ds_kd.plan.samples import load_first
from ds_kd.recipe.models import tokenizer_of
from ds_kd.recipe.offline.record import Record, make_record, read_record
from ds_kd.recipe.offline.rows import single_samples
from ds_kd.recipe.offline.write import Task, format_bytes
from ds_kd.teachers.cache.store import ROW_OVERHEAD

_SAMPLES = 64


def find_record(cfg: RunConfig) -> Record | None:
    """Return the record of the cache that a run reads, or that its fill would make; None for
    another kind of teacher.

    Raises:
        ConfigError: the record or the teacher cannot be read.
    """
    if not cfg.reads_cache:
        return None
    import torch

    found = read_record(Path(cfg.teacher.directory or ""))
    alone = World(0, 1, torch.device("cpu"), "gloo")
    return found or make_record(cfg, None, tokenizer_of(cfg.model, alone), alone)


def count_head_bytes(record: Record | None) -> int:
    """Return the bytes of the teacher's head, which every rank of a cached run holds."""
    return 0 if record is None else record.head_bytes


def describe_cache(cfg: RunConfig, rows: int | None) -> list[str]:
    """Return a line on the size of a run's cache, estimated from the first training samples; none
    for another kind of teacher.

    Args:
        rows: number of training samples, if it is known.
    """
    record = find_record(cfg)
    if record is None:
        return []
    directory = Path(cfg.teacher.directory or "")
    _, some = load_first(cfg, _SAMPLES)
    size = "size unknown, as data or tokenizer are not at hand"
    if some and rows:
        taught = sum(label != IGNORE_INDEX for sample in some for label in sample["labels"])
        of_row = record.row_bytes + ROW_OVERHEAD
        count = round(taught / len(some) * rows)
        size = f"{format_bytes(count * of_row)} for about {count:,} supervised tokens of training"
    there = "is there" if (directory / CACHE_RECORD).is_file() else "is to be made"
    head = f", and {format_bytes(record.head_bytes)} of its head on every rank"
    held = head if record.head_bytes else ""
    return [f"  teacher's cache {directory} ({there}): {size}{held}"]


def describe_time(task: Task, teacher: memory.Shape, mfu: float, tflops: float) -> str:
    """Return a line on the time that a cache takes to make.

    Args:
        teacher: its sizes.
        mfu: share of an accelerator's peak that a forward reaches.
        tflops: that peak, in 10¹² operations per second.
    """
    tokens = 0
    for data in task.sets.values():
        for number, below, lengths in single_samples(data):
            tokens += lengths[number] if lengths else len(below[number]["input_ids"])
    tokens = tokens if task.absent.rows else 0
    operations = 2.0 * tokens * teacher.layer * teacher.layers
    seconds = operations / (mfu * tflops * 1e12)
    return (
        f"time: {operations / 1e12:.3g} TFLOP, {format_seconds(seconds)} on one rank at {mfu:.0%} "
        f"of {tflops:g} TFLOP/s"
    )
