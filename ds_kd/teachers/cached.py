"""A teacher that was run before: its hidden states are read from a cache, its head is in memory.

Any loss at any temperature reads the same logits as from the teacher itself, up to the rounding of
the stored numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ds_kd.losses.head import Head, States
from ds_kd.parallel.world import World, barrier, sum_over
from ds_kd.teachers.base import Teacher
from ds_kd.teachers.cache.keys import KEYS, find_keys
from ds_kd.teachers.cache.store import CacheError, Store

HIDDEN = "hidden"  # the field of a stored row


class CachedTeacher:
    """Reads the teacher's hidden states at the supervised positions.

    Args:
        store: has the rows of every micro-batch.
        head: the teacher's, on the device.
    """

    def __init__(self, store: Store, head: Head):
        self.store, self.head = store, head

    def __call__(self, batch: dict[str, Any]) -> States:
        return self.read(_keys_of(batch))

    def read(self, keys: np.ndarray) -> States:
        """Return the stored output of rows."""
        weight = self.head.weight
        if not len(keys):
            return States(weight.new_empty((0, weight.shape[1])), self.head)
        hidden = self.store.read(keys)[HIDDEN]
        return States(hidden.to(weight.device, weight.dtype, non_blocking=True), self.head)


class FillingTeacher:
    """Runs a teacher where a rank has no row of it, writes the rows, and returns what was stored.

    What is returned is rounded as the stored rows are, so that a step is the same whether its rows
    were there or not.

    Args:
        cached: reads and holds the rows.
        teacher: in an engine; let go of when `settle` finds all rows.
        dtype: of the stored numbers.
        world: the ranks, which run the teacher together.
        is_full: asked after a pass whether no row of the run's samples is absent; a collective,
            which may run the teacher.
    """

    def __init__(
        self,
        cached: CachedTeacher,
        teacher: Teacher,
        dtype: torch.dtype,
        world: World,
        is_full: Callable[[Any], bool] = lambda teacher: False,
    ):
        self.cached, self.dtype, self.world, self.is_full = cached, dtype, world, is_full
        self.teacher: Teacher | None = teacher

    def __call__(self, batch: dict[str, Any]) -> States:
        self.fill(batch)
        return self.cached(batch)

    def fill(self, batch: dict[str, Any]) -> bool:
        """Run the teacher on the batch if a rank lacks rows of its own, and return whether it was
        run; a collective.

        Raises:
            CacheError: a number is too large for the stored ones, or the disk is full.
        """
        if self.teacher is None:
            return False
        keys, store = _keys_of(batch), self.cached.store
        if sum_over([float(store.lacks(keys).any())], self.world.everyone)[0] == 0:
            return False
        output: Any = self.teacher(batch)
        store.add(keys, {HIDDEN: round_hidden(output.hidden, self.dtype)})
        return True

    def settle(self) -> None:
        """Make all rows known to all ranks, and let go of the teacher if none is absent; a
        collective."""
        if self.teacher is None:
            return
        store = self.cached.store
        store.flush()
        barrier(self.world)
        store.refresh()
        if self.is_full(self.teacher):
            self.teacher = None

    def close(self) -> None:
        """Write what this rank has added."""
        self.cached.store.flush()


def round_hidden(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return hidden states as they are stored, on the CPU.

    Raises:
        CacheError: one is too large for the stored numbers.
    """
    stored = hidden.to(dtype)
    if not torch.isfinite(stored).all() and torch.isfinite(hidden).all():
        raise CacheError(
            f"teacher.dtype: a hidden state of {hidden.abs().max().item():.3g} is too large for "
            f"{str(dtype).removeprefix('torch.')}; write bf16 or fp32"
        )
    return stored.cpu()


def _keys_of(batch: dict[str, Any]) -> np.ndarray:
    found = batch.get(KEYS)
    return find_keys(batch) if found is None else found
