"""The protocols of a teacher and its output. The trainer and the loss depend on these alone, not on
any implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ds_kd.losses.buffers import Buffers


class OpenedOutput(Protocol):
    """A teacher's output while a loss reads it, a chunk of supervised tokens at a time.

    One whose logits are only in part those of a teacher has `is_whole = False`: validation then
    measures nothing but the loss.
    """

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        """Return the first `vocab` logits of some supervised tokens, `[tokens, vocab]`, in
        `buffers.dtype`.

        The loss overwrites the result in place: a view of something that is kept, such as a cache,
        would be corrupted. Copy into `buffers.get(name, tokens, vocab)` and return that.

        Args:
            rows: the tokens, as a slice of the batch's `supervised` positions in their order. It
                may reach beyond the last one, and is empty for a batch that supervises nothing.
            vocab: number of ids that both models share.
            name: the name of the buffer to use.
            buffers: memory for the result.
        """


class TeacherOutput(Protocol):
    """A teacher's output for one batch. It holds no tensor of size `[tokens, vocab]`.

    For a loss that compares layers it has a mapping `layers` too: number of a layer, from 0 → its
    output at the supervised positions, `[tokens, width]`.
    """

    def open(self) -> AbstractContextManager[OpenedOutput]:
        """Return a context in which logits can be read; a collective, entered by every rank."""


class Teacher(Protocol):
    """A frozen model, or a source of its logits."""

    def __call__(self, batch: dict[str, Any]) -> TeacherOutput:
        """Return the output for a batch on the device, without a gradient; a collective, called
        by every rank."""


@runtime_checkable
class TakesSteps(Protocol):
    """A teacher that takes several micro-batches of a step together."""

    def answer(self, batches: Sequence[dict[str, Any]], tokens: float) -> Iterator[TeacherOutput]:
        """Return the outputs for the micro-batches of a step, each as `Teacher` returns it. An
        output is used before the next one is asked for.

        Args:
            batches: on the device.
            tokens: of a micro-batch, padding included; the same number on every rank.
        """


def ask(
    teacher: Teacher, batches: Sequence[dict[str, Any]], tokens: float
) -> Iterator[TeacherOutput]:
    """Return a teacher's outputs for the micro-batches of a step; see `TakesSteps.answer`."""
    if isinstance(teacher, TakesSteps):
        return teacher.answer(batches, tokens)
    return map(teacher, batches)
