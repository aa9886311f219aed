"""The part of a micro-batch that a rank has where the tokens of samples are split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.teachers.cache.keys import KEYS
from ds_kd.train.batches import Batch

#: Values of a micro-batch for each supervised position.
_OF_ROWS = ("supervised_labels", "supervised_counts", KEYS)


@dataclass(frozen=True)
class TakePart:
    """Collates samples and keeps this rank's tokens, in the loader's worker processes.

    Args:
        collate: makes the whole micro-batch.
        rank, size: of the sequence group.
    """

    collate: Callable[[list[Any]], Batch]
    rank: int
    size: int

    def __call__(self, samples: list[Any]) -> Batch:
        return take_part(self.collate(samples), self.rank, self.size)


def take_part(batch: Batch, rank: int, size: int) -> Batch:
    """Return the tokens `rank`, `rank` + `size`, … of each row, as `parallel.sequence` joins them.

    Labels belong to the tokens before them already, so that none is lost where rows are cut.
    Lengths and parents of segments, which attention asks for, stay those of the whole rows.

    Args:
        batch: from `data.collate`.

    Returns:
        The batch with its tensors cut, `position_ids` in any case, and `num_parts`. The numbers of
            labels, slots and tokens are shares of this rank, which add up to those of the batch.
    """
    rows, length = batch["input_ids"].shape
    short = -length % size
    positions = batch.get("position_ids")
    if positions is None:
        positions = _count_up(batch["input_ids"])

    def cut(part: Tensor, filler: int = 0) -> Tensor:
        return F.pad(part, (0, short), value=filler)[:, rank::size].contiguous()

    # A row of packs is filled up by a sample of its own.
    found = {**batch, "input_ids": cut(batch["input_ids"]), "position_ids": cut(positions)}
    if "labels" in batch:
        found["labels"] = cut(batch["labels"], IGNORE_INDEX)
    if short and "segment_lengths" in batch:
        found["segment_lengths"] = [*batch["segment_lengths"], short]
    if short and "segment_parents" in batch:
        found["segment_parents"] = [*batch["segment_parents"], -1]

    # Supervised positions are numbered through all rows.
    width = (length + short) // size
    mine = batch["supervised"] % length % size == rank
    for name in ("supervised", "supervised_once"):
        if name in batch:
            row, at = batch[name] // length, batch[name] % length
            found[name] = (row * width + at // size)[at % size == rank]
    found |= {name: batch[name][_like(mine, batch[name])] for name in _OF_ROWS if name in batch}
    counts = found.get("supervised_counts")
    found["num_labels"] = int(mine.sum() if counts is None else counts.sum())
    for name in ("num_tokens", "num_shared"):
        if name in batch:
            found[name] = (batch[name] + size - 1 - rank) // size
    return {**found, "num_slots": rows * width, "num_parts": size}


def _count_up(ids: Tensor) -> Tensor:
    """Return the positions 0, 1, … of each row."""
    return ids.new_ones(ids.shape).cumsum(1) - 1


def _like(mask: Tensor, part: Any) -> Any:
    """Return a mask of the kind that `part`, a tensor or an array, is indexed by."""
    return mask if isinstance(part, Tensor) else mask.numpy()
