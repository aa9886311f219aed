"""Validation: the means of the loss and of what it measures, over held-out data of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_kd.errors import TrainingError
from ds_kd.evaluate.samples import Generations
from ds_kd.losses.scores import average
from ds_kd.parallel.world import World, sum_by_name, sum_over
from ds_kd.teachers.base import Teacher
from ds_kd.train.batches import add_up, move_batch
from ds_kd.train.metrics import memory_gib


@dataclass
class Measured:
    """The findings of a validation.

    Args:
        means: per supervised token over all sets, and `tokens_per_sec` and `memory` (GiB).
        each: means of each set that has a name.
        texts: what the models have generated, or None.
    """

    means: dict[str, float]
    each: dict[str, dict[str, float]]
    texts: Any


@dataclass
class Validation:
    """The held-out data of a run, and what the student is compared with there.

    Args:
        loaders: micro-batches of each set by its name; a single set has an empty name.
        teacher: None if the run has none.
        world: the ranks of the job.
        generations: held-out questions that the models answer at every validation, or None.
    """

    loaders: dict[str, Any]
    teacher: Teacher | None
    world: World
    generations: Generations | None = None

    @torch.no_grad()
    def measure(self, student: Any, should_stop: Callable[[], bool]) -> Measured | None:
        """Return the means over all supervised tokens of all sets and ranks; a collective.

        Args:
            student: DeepSpeed engine of a `models.causal_lm.Student`; left in training mode.
            should_stop: asked before every batch; True ends with None. The same on all ranks.

        Raises:
            TrainingError: no token of a set is supervised.
        """
        started = time.perf_counter()
        student.eval()
        found = {}
        for name, loader in self.loaders.items():
            measured = self._measure(name, loader, student, should_stop)
            if measured is None:
                student.train()
                return None
            found[name] = measured
        texts = None if self.generations is None else self.generations.write()
        student.train()

        # One division by the global count over all sets, as in a training step.
        labels = sum(count for _, count, _ in found.values())
        tokens = sum(count for *_, count in found.values())
        sums: dict[str, float] = {}
        for totals, *_ in found.values():
            add_up(sums, totals)
        means = average(sums, labels)
        means["tokens_per_sec"] = tokens / (time.perf_counter() - started)
        means["memory"] = memory_gib(self.world.device)
        each = {name: average(totals, count) for name, (totals, count, _) in found.items() if name}
        return Measured(means, each, texts)

    def _measure(
        self, name: str, loader: Any, student: Any, should_stop: Callable[[], bool]
    ) -> tuple[dict[str, float], int, int] | None:
        """Return (sums by name, supervised tokens, tokens) of a set over all ranks, or None if a
        rank was asked to stop.

        Raises:
            TrainingError: no token is supervised.
        """
        sums: dict[str, torch.Tensor] = {}
        labels, tokens = 0, 0
        for batch in loader:
            if should_stop():
                return None
            labels, tokens = labels + batch["num_labels"], tokens + batch["num_tokens"]
            batch = move_batch(batch, self.world.device)
            teacher_output = None if self.teacher is None else self.teacher(batch)
            loss, parts = student(batch, teacher_output)
            add_up(sums, {"loss": loss, **parts})

        labels, tokens = (int(x) for x in sum_over([labels, tokens], self.world.tokens))
        if labels == 0:
            raise TrainingError(
                f"{'.'.join(filter(None, ('validation_dataset', name)))}: no sample has a "
                f"supervised token; look at seq_length, truncation and the answers"
            )
        return sum_by_name(sums, self.world.tokens), labels, tokens
