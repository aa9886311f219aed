"""The schedule of validations, checkpoints and the end of a run, in optimizer steps, and what a
run has come to at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run. Steps are numbered from 1, as they are logged.

    Args:
        steps_per_epoch: optimizer steps in one pass over the data, the last (perhaps partial)
            global batch included.
        num_epochs: passes over the data.
        max_steps: stop after this many steps even within an epoch; None leaves it to `num_epochs`.
        val_every_steps: validate each time after this many steps, or after each `epoch`; None
            validates at the end only.
        ckpt_every_steps: save each time after this many steps, or after each `epoch`; None saves at
            the end only.
        patience: end after this many validations in a row that have not lowered the loss; None
            never ends early.
    """

    steps_per_epoch: int
    num_epochs: int = 1
    max_steps: int | None = None
    val_every_steps: int | str | None = None
    ckpt_every_steps: int | str | None = None
    patience: int | None = None

    @property
    def total_steps(self) -> int:
        whole = self.steps_per_epoch * self.num_epochs
        return whole if self.max_steps is None else min(whole, self.max_steps)

    @property
    def only_validates(self) -> bool:
        """Return whether the run looks at what is there, and trains and saves nothing."""
        return self.max_steps == 0

    def describe_unreached(self) -> str:
        """Return a sentence where the last epoch ends the run before `max_steps`, or an empty
        text."""
        whole, most = self.steps_per_epoch * self.num_epochs, self.max_steps
        if most is None or most <= whole or not whole:
            return ""
        needed = -(-most // self.steps_per_epoch)
        return (
            f"step_scheduler.max_steps: {most} is not reached: num_epochs: {self.num_epochs} of "
            f"{self.steps_per_epoch} step(s) each ends the run after {whole}; num_epochs: {needed} "
            f"would reach it"
        )

    def describe_longer(self, step: int) -> str:
        """Return the keys that let a run go on which is done after this step."""
        if not self.is_last(step):
            return "a larger step_scheduler.patience"
        whole, most = self.steps_per_epoch * self.num_epochs, self.max_steps
        if most is None or whole < most:
            return "a larger num_epochs"
        return "a larger max_steps" if most < whole else "a larger max_steps and num_epochs"

    def is_last(self, step: int) -> bool:
        return step >= self.total_steps

    def has_no_patience(self, validations: int) -> bool:
        """Return whether this many validations in a row without a lower loss end the run."""
        return self.patience is not None and validations >= self.patience

    def validates(self, step: int) -> bool:
        return self.is_last(step) or self._is_due(step, self.val_every_steps)

    def saves(self, step: int) -> bool:
        return self.is_last(step) or self._is_due(step, self.ckpt_every_steps)

    def _is_due(self, step: int, every: int | str | None) -> bool:
        if every is None:
            return False
        return step % (self.steps_per_epoch if isinstance(every, str) else every) == 0


@dataclass(frozen=True)
class Summary:
    """The result of `Trainer.train`; true if the run is finished.

    The losses are the same on every rank.

    Args:
        finished: the schedule or `patience` has ended the run; False if it was asked to stop.
        step: optimizer steps done, those before a resume included.
        total_steps: of the schedule.
        training: means per supervised token (nats) of the last step, with its learning rate and
            gradient norm, by the names of metrics.jsonl; empty if no step was taken.
        validation: means of the last validation made by it (`loss`, `ce_loss`, …); empty without.
        lowest_loss: the lowest validation loss of the run; None without one.
        checkpoint: the newest one; None if there is none.
    """

    finished: bool
    step: int
    total_steps: int
    training: dict[str, float]
    validation: dict[str, float]
    lowest_loss: float | None
    checkpoint: Path | None

    def __bool__(self) -> bool:
        return self.finished
