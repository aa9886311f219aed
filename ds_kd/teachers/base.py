"""What a step asks of a teacher. The trainer and the loss know these two protocols and no kind of
either."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ds_kd.losses.buffers import Buffers


class OpenedOutput(Protocol):
    """A teacher's output while a loss reads it."""

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        """Return the first `vocab` logits of some supervised tokens, `[rows, vocab]`.

        Args:
            rows: of the batch's supervised tokens.
            vocab: ids both models share.
            name: of the buffer to use.
            buffers: room, which the caller overwrites.
        """


class TeacherOutput(Protocol):
    """A teacher's answer to one batch. It keeps nothing of `[tokens, vocab]` size."""

    def open(self) -> AbstractContextManager[OpenedOutput]:
        """Return what gives logits for the time of the block; entered by every rank alike."""


class Teacher(Protocol):
    """A frozen model, or what stands for one."""

    def __call__(self, batch: dict[str, Any]) -> TeacherOutput:
        """Return the answer to a batch on the device; called by every rank alike, without a
        gradient."""
