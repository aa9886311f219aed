"""Write a teacher's outputs for all samples of a run into a cache."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_kd.config.checks.combinations import misfit_of_batch
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.schema import RunConfig
from ds_kd.evaluate.progress import Progress, format_seconds
from ds_kd.parallel.world import World, sum_over
from ds_kd.recipe.build import build_teacher
from ds_kd.recipe.data import build_loader, build_samples
from ds_kd.recipe.lengths import check_lengths
from ds_kd.recipe.models import tokenizer_of
from ds_kd.recipe.offline.record import Record, make_record
from ds_kd.recipe.offline.rows import Absent, find_absent, list_asked
from ds_kd.recipe.offline.teacher import (
    build_kind,
    create_cache,
    is_verified,
    open_record,
    verify,
)
from ds_kd.teachers.cache.store import ROW_OVERHEAD, Store
from ds_kd.teachers.cached import CachedTeacher, FillingTeacher
from ds_kd.train.batches import move_batch


@dataclass(frozen=True)
class Task:
    """The material of a cache.

    Args:
        cfg: a config whose teacher is cached and may be filled.
        tokenizer: the student's.
        sets: all samples, by the key of their data set.
        loaders: of their micro-batches.
        store: the rows that are there.
        absent: what it lacks.
        record: of the cache, perhaps of one that is still to be made.
        is_new: whether it is still to be made.
    """

    cfg: RunConfig
    tokenizer: Any
    sets: dict[str, Any]
    loaders: list[Any]
    store: Store
    absent: Absent
    record: Record
    is_new: bool

    @property
    def bytes_absent(self) -> int:
        return self.absent.rows * (self.record.row_bytes + ROW_OVERHEAD)

    def describe(self) -> list[str]:
        """Return lines on what there is to do."""
        cfg, record = self.cfg, self.record
        directory = cfg.teacher.directory
        lines = [
            f"teacher: {record.teacher}, run in {record.dtype}",
            f"samples: {self.absent.of:,} in {', '.join(self.sets)}",
            f"rows: {self.absent.rows:,} to compute, {len(self.store):,} there, each "
            f"{record.describe()}",
            f"size: {format_bytes(self.bytes_absent)} to write into {directory}",
        ]
        if self.is_new and record.head_bytes:
            lines[-1] += f", and {format_bytes(record.head_bytes)} of the teacher's head"
        return lines


def plan_cache(cfg: RunConfig, world: World) -> Task:
    """Return what a config's cache lacks. The teacher is not loaded.

    Raises:
        ConfigError: data cannot be loaded, the cache is of another teacher, or the disk too small.
    """
    if not cfg.asks_teacher:
        raise ConfigError([problem("kd_ratio", cfg.kd_ratio, "a run that asks a teacher")])
    tokenizer = tokenizer_of(cfg.model, world)
    samples, held_out = build_samples(cfg, tokenizer, world)
    sets = list_asked(cfg, samples, held_out)

    # An earlier call may have written some of the rows, or all.
    directory = Path(cfg.teacher.directory or "")
    found, store = open_record(cfg, tokenizer, world), Store(directory)
    record = found or make_record(cfg, None, tokenizer, world)
    task = Task(
        cfg,
        tokenizer,
        sets,
        [*_build_loaders(cfg, samples, held_out, world)],
        store,
        find_absent(sets, store, world),
        record,
        found is None,
    )
    _check_room(task, directory)
    return task


def _build_loaders(
    cfg: RunConfig, samples: Any, held_out: dict[str, Any], world: World
) -> Iterator[Any]:
    """Yield the loaders of all samples. Micro-batches are those of the run's first epoch where the
    number of ranks allows that, so that its rows come out the same to the last bit."""
    if cfg.kd_ratio > 0:
        kwargs = {**cfg.dataloader.kwargs, "drop_last": False}
        fits = not misfit_of_batch(cfg.step_scheduler, world.data.size)
        yield build_loader(cfg, samples, replace(cfg.dataloader, kwargs=kwargs), world, fits)[0]
    for part in held_out.values():
        yield build_loader(cfg, part, cfg.validation_dataloader, world, False)[0]


def _check_room(task: Task, directory: Path) -> None:
    """Refuse a disk that is too small.

    Raises:
        ConfigError: tells both sizes.
    """
    path = directory.absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if task.bytes_absent > free:
        needed = f"{format_bytes(task.bytes_absent)} of room for {task.absent.rows:,} rows"
        hint = f"its disk has {format_bytes(free)}"
        raise ConfigError([problem("--output", str(directory), needed, hint)])


def write_cache(task: Task, world: World, should_stop: Callable[[], bool]) -> bool:
    """Compute and write what a cache lacks (a collective), and return whether it has all rows now.

    Args:
        should_stop: asked on every rank before each micro-batch; one that says so stops all.

    Raises:
        ConfigError: the teacher cannot be loaded.
        CacheError: rows cannot be written.
    """
    cfg, directory = task.cfg, Path(task.cfg.teacher.directory or "")
    if not (task.absent.rows or task.is_new) and is_verified(cfg, directory, world):
        return True  # without loading the teacher
    check_lengths(cfg, task.loaders)
    live = build_teacher(cfg, [], world)
    record = create_cache(cfg, live, task.tokenizer, world) if task.is_new else task.record
    cached = CachedTeacher(task.store, build_kind(directory, record, world))
    filling = FillingTeacher(cached, live, world)
    try:
        stops = _fill(task, filling, world, should_stop)
    finally:
        filling.close()
    filling.settle()
    if not stops:
        verify(live, cached, task.sets, directory, world)
    return not stops


def _fill(
    task: Task, filling: FillingTeacher, world: World, should_stop: Callable[[], bool]
) -> bool:
    """Run the teacher on all micro-batches, and return whether a rank was asked to stop."""
    total = sum(len(loader.batch_sampler) for loader in task.loaders)
    title = f"rows of {task.record.teacher}"
    progress = Progress(title, task.absent.of, 0, world.is_main)
    share = task.absent.of / max(1, total)
    is_told = not world.is_main
    for number, batch in enumerate(itertools.chain(*task.loaders), 1):
        if sum_over([float(should_stop())], world.everyone)[0]:
            return True
        started = time.monotonic()
        if filling.fill(move_batch(batch, world.device)) and not is_told:
            seconds = (time.monotonic() - started) * (total - number)
            print(f"time: about {format_seconds(seconds)} on these ranks", flush=True)
            is_told = True
        done = round(share * number) if number < total else task.absent.of
        progress.advance(done - progress.done)
    return False


def format_bytes(size: float) -> str:
    """Return a size with its unit, such as `4.1 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
