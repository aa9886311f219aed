"""A teacher that was run before: what it gave is read from a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ds_kd.parallel.world import World, barrier, sum_over
from ds_kd.teachers.base import Teacher, TeacherOutput
from ds_kd.teachers.cache.keys import KEYS, find_keys
from ds_kd.teachers.cache.kinds import Kind
from ds_kd.teachers.cache.store import Store


class CachedTeacher:
    """Reads what is kept of the teacher's output at the supervised positions.

    Args:
        store: has the rows of every micro-batch.
        kind: what rows hold.
    """

    def __init__(self, store: Store, kind: Kind):
        self.store, self.kind = store, kind

    def __call__(self, batch: dict[str, Any]) -> TeacherOutput:
        return self.read(_keys_of(batch))

    def read(self, keys: np.ndarray) -> TeacherOutput:
        """Return the stored output of rows."""
        return self.kind.read(self.store.read(keys) if len(keys) else None)


class FillingTeacher:
    """Runs a teacher where a rank has no row of it, writes the rows, and returns what was stored.

    Its answers are rounded as the stored rows are, so that a step is the same whether its rows
    were there or not.

    Args:
        cached: reads and holds the rows.
        teacher: in an engine; let go of when `settle` finds all rows.
        world: the ranks, which run the teacher together.
        is_full: asked after a pass whether no row of the run's samples is absent; a collective,
            which may run the teacher.
    """

    def __init__(
        self,
        cached: CachedTeacher,
        teacher: Teacher,
        world: World,
        is_full: Callable[[Any], bool] = lambda teacher: False,
    ):
        self.cached, self.world, self.is_full = cached, world, is_full
        self.teacher: Teacher | None = teacher

    def __call__(self, batch: dict[str, Any]) -> TeacherOutput:
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
        store.add(keys, self.cached.kind.make(self.teacher(batch), keys))
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


def _keys_of(batch: dict[str, Any]) -> np.ndarray:
    found = batch.get(KEYS)
    return find_keys(batch) if found is None else found
