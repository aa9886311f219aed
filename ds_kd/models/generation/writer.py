"""Have the student write texts between two steps, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ds_kd.models import attention
from ds_kd.models.generation.replica import Replica
from ds_kd.models.generation.sampling import Draw, Sampling, Written, count_rows, group, write
from ds_kd.parallel.layout import Group
from ds_kd.parallel.world import World


class Writer:
    """Returns what the student writes after prompts: the same texts on any number of ranks.

    Args:
        engine: DeepSpeed engine of a `models.causal_lm.Student`.
        replica: a copy of its model to write with; None writes with the sharded model itself.
        how: how tokens are drawn.
        ends: tokens that end a text.
        room: returns how many tokens may follow a prompt of so many.
        world: the ranks, which share the batches.
    """

    def __init__(
        self,
        engine: Any,
        replica: Replica | None,
        how: Sampling,
        ends: list[int],
        room: Callable[[int], int],
        world: World,
    ):
        self.engine, self.replica, self.how, self.ends = engine, replica, how, ends
        self.room, self.world = room, world

    def __call__(self, prompts: Sequence[list[int]], draws: Sequence[Draw]) -> list[Written]:
        """Return the texts of all prompts on every rank (a collective); a prompt that leaves no
        room gets an empty one."""
        batches = self._divide(prompts)
        mine: dict[int, Written] = {}
        if batches:
            with self._open() as (model, engine):
                for first in range(0, len(batches), self._writers.size):
                    self._write(model, engine, batches, first, prompts, draws, mine)

        # Every rank learns all texts, as it trains on others than those that it wrote.
        parts: list[Any] = [mine]
        if self.world.size > 1:
            parts = [None] * self.world.size
            dist.all_gather_object(parts, mine, group=self.world.host_group)
        found = {number: text for part in parts for number, text in part.items()}
        return [found.get(number, Written([], False)) for number in range(len(prompts))]

    def _divide(self, prompts: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
        """Return (limit of new tokens, numbers of the prompts) of each batch."""
        limits = [min(self.how.max_new_tokens, self.room(len(prompt))) for prompt in prompts]
        batches: list[tuple[int, list[int]]] = []
        least = count_rows(self.world.device.type)
        for limit in sorted({limit for limit in limits if limit > 0}, reverse=True):
            numbers = [k for k, each in enumerate(limits) if each == limit]
            for batch in group([prompts[k] for k in numbers], limit, least):
                batches.append((limit, [numbers[k] for k in batch]))
        return batches

    def _write(
        self,
        model: Any,
        engine: Any | None,
        batches: list[tuple[int, list[int]]],
        first: int,
        prompts: Sequence[list[int]],
        draws: Sequence[Draw],
        found: dict[int, Written],
    ) -> None:
        """Write one batch on this rank, of those from `first` on, and add its texts to `found`."""
        at = first + self._writers.rank
        if at < len(batches):
            limit, numbers = batches[at]
            texts = write(
                model,
                [prompts[k] for k in numbers],
                [draws[k] for k in numbers],
                replace(self.how, max_new_tokens=limit),
                self.ends,
                engine,
            )
            found.update(zip(numbers, texts, strict=True))
        elif engine is not None:  # all ranks take part in the forwards of a sharded model
            _, numbers = batches[0]
            short = replace(self.how, max_new_tokens=1)
            write(model, [prompts[numbers[0]]], [draws[numbers[0]]], short, self.ends, engine)

    @property
    def _writers(self) -> Group:
        """Return the group of ranks that write different texts. Those that hold parts of the same
        matrices write the same ones, unless each has a whole copy."""
        return self.world.tokens if self.replica is None else self.world.everyone

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any | None]]:
        """Yield the model to write with, and its engine if it is sharded."""
        if self.replica is not None:
            with self.replica.fill() as model:
                yield model, None
            return
        model = self.engine.module.model
        by_sample = attention.is_by_sample(model)
        self.engine.eval()
        if by_sample:  # prompts are padded on the left, which packs are not
            attention.attend_by_sample(model, False)
        try:
            yield model, self.engine
        finally:
            if by_sample:
                attention.attend_by_sample(model)
            self.engine.train()
