"""The protocols of a teacher and its output. The trainer and the loss depend on these alone, not on
any implementation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ds_kd.losses.buffers import Buffers


class OpenedOutput(Protocol):
    """A teacher's output while a loss reads it."""

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        """Return the first `vocab` logits of some supervised tokens, `[tokens, vocab]`.

        Args:
            rows: the tokens, numbered among the batch's supervised ones.
            vocab: number of ids that both models share.
            name: the buffer to use.
            buffers: memory for the result, which the caller overwrites.
        """


class TeacherOutput(Protocol):
    """A teacher's output for one batch. It holds no tensor of size `[tokens, vocab]`."""

    def open(self) -> AbstractContextManager[OpenedOutput]:
        """Return a context in which logits can be read; a collective, entered by every rank."""


class Teacher(Protocol):
    """A frozen model, or a source of its logits."""

    def __call__(self, batch: dict[str, Any]) -> TeacherOutput:
        """Return the output for a batch on the device, without a gradient; a collective, called
        by every rank."""
