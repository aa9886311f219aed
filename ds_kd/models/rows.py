"""The supervised tokens of a micro-batch, shared out over the ranks that have cut a model's layers.

After the last layer all of them have the same hidden states. Each computes the loss of its share of
the tokens with whole heads, so that the logits, the largest tensors of a step, are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kd.losses.buffers import Buffers
from ds_kd.parallel.layout import Group


class Rows:
    """This rank's share of some rows; all of them in a group of one.

    Args:
        group: `world.tensor`.
        count: number of rows.
    """

    def __init__(self, group: Group, count: int):
        self.group = group
        first, last = (count * k // group.size for k in (group.rank, group.rank + 1))
        self.slice = slice(first, last)

    def select(self, hidden: Tensor) -> Tensor:
        """Return this rank's hidden states; in backward every rank gets the gradients of all."""
        if self.group.size == 1:
            return hidden
        part: Tensor = _Select.apply(hidden, self)  # type: ignore[no-untyped-call]
        return part

    def cut(self, part: Tensor) -> Tensor:
        """Return what belongs to this rank's rows of something else."""
        return part[self.slice]

    def of(self, output: Any | None) -> Any | None:
        """Return a teacher's output for this rank's rows."""
        return output if output is None or self.group.size == 1 else _PartOfOutput(output, self)

    def join(self, total: Tensor, sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the sums of all rows (a collective).

        ZeRO averages the head's gradient over these ranks too, as it does those of other weights,
        of which each has the whole. So each part counts as often as there are ranks.
        """
        if self.group.size == 1:
            return total, sums
        found = torch.stack([total.detach().float(), *sums.values()])
        dist.all_reduce(found, group=self.group.device_group)
        whole, *parts = found.unbind()
        scaled = self.group.size * total
        return scaled - scaled.detach() + whole, dict(zip(sums, parts, strict=True))


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.count = rows, len(hidden)
        return hidden[rows.slice].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.rows.group
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        whole[ctx.rows.slice] = gradient / group.size  # `join` has multiplied
        dist.all_reduce(whole, group=group.device_group)
        return whole, None


@dataclass(frozen=True)
class _PartOfOutput:
    """A teacher's output for this rank's rows (`teachers.base.TeacherOutput`)."""

    output: Any
    rows: Rows

    @contextmanager
    def open(self) -> Iterator[_PartOfOpened]:
        with self.output.open() as opened:
            yield _PartOfOpened(opened, self.rows, getattr(opened, "is_whole", True))


@dataclass(frozen=True)
class _PartOfOpened:
    """See `teachers.base.OpenedOutput`."""

    opened: Any
    rows: Rows
    is_whole: bool

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        first, last = self.rows.slice.start, self.rows.slice.stop
        there = slice(first + rows.start, min(first + rows.stop, last))
        found: Tensor = self.opened.logits(there, vocab, name, buffers)
        return found
