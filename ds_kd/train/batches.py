"""The source of the micro-batches of each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Batch = dict[str, Any]


class Batches(Protocol):
    """The source of a run's micro-batches. Its position is the number of steps done, which
    `TrainState` keeps; a resumed run asks for the batches after that step."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in one pass over the data."""

    def after(self, step: int) -> Iterator[list[Batch]]:
        """Return the micro-batches of step `step` + 1 and of all that follow, epoch after epoch.

        Every rank gets as many as the others: ZeRO-3's collectives need all ranks in every forward.
        """

    def describe(self) -> dict[str, Any]:
        """Return what is logged of the micro-batches of the last step, by tag."""


class LoaderBatches:
    """Micro-batches of a data loader.

    Args:
        loader: its `batch_sampler` is a `GlobalBatchSampler`.
    """

    def __init__(self, loader: Any):
        self.loader, self._sampler = loader, loader.batch_sampler

    @property
    def steps_per_epoch(self) -> int:
        return int(self._sampler.steps_per_epoch)

    def describe(self) -> dict[str, Any]:
        return {}

    def after(self, step: int) -> Iterator[list[Batch]]:
        epoch, done = divmod(step, self.steps_per_epoch)
        while True:
            # The iterator reads the sampler's position once, when it is created.
            self._sampler.seek(epoch, done)
            batches = iter(self.loader)
            for step_in_epoch in range(done, self.steps_per_epoch):
                yield [next(batches) for _ in range(self._sampler.micro_batches(step_in_epoch))]
            del batches  # its workers end before those of the next epoch start
            epoch, done = epoch + 1, 0


class NotedPasses:
    """Micro-batches of another source, before each pass over which a function is called.

    Args:
        batches: the source.
        at_pass: called on all ranks at once, also before the first step of a resumed run if that
            begins a pass.
    """

    def __init__(self, batches: Batches, at_pass: Callable[[], None]):
        self.batches, self.at_pass = batches, at_pass

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def describe(self) -> dict[str, Any]:
        return self.batches.describe()

    def after(self, step: int) -> Iterator[list[Batch]]:
        for number, micro_batches in enumerate(self.batches.after(step), step):
            if number % self.steps_per_epoch == 0:
                self.at_pass()
            yield micro_batches


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def add_up(sums: dict[str, Any], parts: dict[str, Any]) -> None:
    """Add named values to the sums of the same names."""
    for name, part in parts.items():
        sums[name] = sums[name] + part if name in sums else part


def list_samples(micro_batches: list[Batch]) -> str:
    """Return the names of the samples of micro-batches, for a message."""
    ids = [str(i) for batch in micro_batches for i in batch["sample_ids"] if i != ""]
    return ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
