"""Run a task on a model: samples in batches, batches shared out over ranks, records gathered.

Batches depend on the samples alone, never on the number of ranks or on where an earlier evaluation
stopped: a sum in floating point depends a little on its batch, and so all of these give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from ds_kd.data.rows.detect import recognise, samples_of
from ds_kd.data.rows.source import find_held_out, load_rows, name_bad_row, name_bad_text
from ds_kd.evaluate.journal import Journal
from ds_kd.evaluate.progress import Progress
from ds_kd.evaluate.subject import Subject
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.evaluate.tasks.kinds import Item, Record, Task
from ds_kd.parallel.world import World, on_rank0

_TOKENS, _TOKENS_ON_GPU = 2048, 16_384


def tokens_of_batch(device: str) -> int:
    """Return the most tokens of a batch on a type of device, padding included."""
    return _TOKENS if device == "cpu" else _TOKENS_ON_GPU


@dataclass(frozen=True)
class Items:
    """The samples of a task, tokenised for one model.

    Args:
        items: what there is to score.
        rows: the row of each, from 0; a row may have several items, or none.
        total: number of rows.
    """

    items: list[Item]
    rows: list[int]
    total: int

    def merge(self, records: list[Record]) -> list[Record]:
        """Return one record for each row: the numbers of its items' records, added up."""
        merged: dict[int, Record] = {}
        for row, record in zip(self.rows, records, strict=True):
            before = merged.get(row)
            merged[row] = record if before is None else {k: before[k] + record[k] for k in record}
        return [*merged.values()]


def columns_in(source: str) -> list[str]:
    """Return the columns of a file's rows.

    Raises:
        ValueError: it cannot be read.
    """
    return list(load_rows(source, find_held_out(source), (), 1).column_names)


def load_items(task: Task, source: str, limit: int | None, encoder: Encoder) -> Items:
    """Return the samples of a file, tokenised.

    Args:
        source: see `load_rows`; of its splits `find_held_out` takes one.
        limit: take only the first rows, this many.

    Raises:
        ValueError: the rows cannot be read, lack columns, or none has anything to score.
    """
    made: list[list[Item]] = []
    split = find_held_out(source)
    if task.columns:
        rows = load_rows(source, split, task.columns, limit)
        prepare = name_bad_row(source, split, lambda row: task.prepare(row, encoder))
        with name_bad_text(source):
            made = [prepare(row, index) for index, row in enumerate(rows)]
    else:
        samples = samples_of(source, encoder.tokenizer, limit, split)
        made = [task.prepare(sample, encoder) for sample in samples]

    # A sample without a supervised token tells nothing.
    if not any(made):
        raise ValueError(f"{source!r}: none of its {len(made)} rows has anything to score")
    if all(item.get("references") == [] for items in made for item in items):
        raise ValueError(f"{source!r}: no row has a reference answer; give labelled rows")
    rows_of = [row for row, items in enumerate(made) for _ in items]
    return Items([item for items in made for item in items], rows_of, len(made))


def is_plain_text(source: str) -> bool:
    """Return whether the rows of a file are plain text, and no conversation.

    Raises:
        ValueError: it cannot be read.
    """
    found = recognise(columns_in(source))
    return found is not None and found.columns == ("text",)


def plan_batches(task: Task, items: list[Item], tokens: int, most: int) -> list[list[int]]:
    """Return the items of each batch, long ones first; a batch holds items of similar length.

    Args:
        tokens: the most tokens of a batch, padding included; an item may have more by itself.
        most: the most items of a batch.
    """
    sizes = [task.measure(item) for item in items]
    batches: list[list[int]] = []
    for k in sorted(range(len(items)), key=lambda k: (-sizes[k], k)):
        # The first item of a batch is its longest, to which the others are padded.
        last = batches[-1] if batches else []
        if last and len(last) < most and (len(last) + 1) * sizes[last[0]] <= tokens:
            last.append(k)
        else:
            batches.append([k])
    return batches


class Runs(Protocol):
    """The part of a task that is put to a model."""

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        """Return the record of each item of a batch."""


def run_task(
    task: Runs,
    load: Callable[[], Subject],
    items: list[Item],
    batches: list[list[int]],
    world: World,
    journal: Journal,
    title: str,
) -> list[Record]:
    """Return the record of every item, on every rank. Items are counted as samples.

    Args:
        load: returns a plain model on each rank; called if there is anything left to do.
        batches: from `plan_batches`.
        journal: has the records of an earlier evaluation, and takes new ones.
        title: the beginning of the line of progress.
    """
    records: dict[int, Record] = on_rank0(journal.read, world)
    todo = [batch for batch in batches if not all(k in records for k in batch)]
    mine = todo[world.rank :: world.size]

    # Each rank tells its own share, which takes about as long as those of the others.
    count = sum(map(len, mine))
    progress = Progress(title, len(items), len(items) - sum(map(len, todo)), world.is_main)
    share = sum(map(len, todo)) / max(1, count)
    made: dict[int, Record] = {}
    subject = load() if todo else None
    for number, batch in enumerate(mine, 1):
        assert subject is not None
        found = dict(zip(batch, task.run(subject, [items[k] for k in batch]), strict=True))
        journal.add(found)
        made |= found
        progress.advance(progress.total if number == len(mine) else round(len(batch) * share))
    journal.close()
    for part in _gather(made, world):
        records |= part
    return [records[k] for k in range(len(items))]


def run_task_together(
    task: Task,
    subject: Subject,
    items: list[Item],
    world: World,
    should_stop: Callable[[], bool],
) -> list[Record] | None:
    """Return the record of every item, on every rank, from a model that is sharded over the ranks:
    all of them run equally many batches.

    Args:
        should_stop: asked before every batch, on all ranks at once; True ends with None.
    """
    batches = plan_batches(task, items, tokens_of_batch(world.device.type), len(items))
    size, made = world.tokens.size, dict[int, Record]()
    for start in range(0, len(batches), size):
        if should_stop():
            return None
        # Without a batch of its own a rank runs the last one, the shortest, and drops the records.
        number = start + world.tokens.rank
        batch = batches[min(number, len(batches) - 1)]
        found = dict(zip(batch, task.run(subject, [items[k] for k in batch]), strict=True))
        made |= found if number < len(batches) else {}
    records: dict[int, Record] = {}
    for part in _gather(made, world):
        records |= part
    return [records[k] for k in range(len(items))]


def _gather(made: dict[int, Record], world: World) -> list[dict[int, Record]]:
    """Return what each rank has made."""
    if world.size == 1:
        return [made]
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, made, group=world.host_group)
    return parts
