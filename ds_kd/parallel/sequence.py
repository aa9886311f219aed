"""The tokens of a sample, split over ranks: which of them a rank has, and how attention gets all.

Everything in a transformer but attention treats a token alone. Around attention the ranks of a
sequence group exchange tokens for heads, all to all: before it a rank has its tokens for all heads,
inside it all tokens for its heads (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509). So
attention is computed as on one rank, mask and packs included, and sees fewer heads.

Rank r of n has the tokens r, r + n, r + 2n, … and not a run of them, so that padding and supervised
tokens, which stand at the end of a sample, are shared out evenly. The exchange sorts them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kd.parallel.layout import Group


class Exchange:
    """Exchanges tokens for heads among the ranks of a sequence group (collectives).

    Ranks may have different numbers of heads, and a head of keys and values goes to every rank
    whose queries use it.

    Args:
        group: `world.sequence`.
    """

    def __init__(self, group: Group):
        self.group = group

    def gather_tokens(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of this rank's heads, in their order.

        Args:
            query, key, value: this rank's tokens `[batch, heads, tokens, head size]`; keys and
                values may have fewer heads, each for as many neighbouring ones of queries.

        Returns:
            `[batch, own heads, all tokens, head size]`; keys and values have a head for each of
                the queries', or for each of equally many.

        Raises:
            ValueError: there are fewer heads than ranks.
        """
        heads, shared = query.shape[1], key.shape[1]
        runs = divide_heads(heads, self.group.size)
        used = [find_shared(run, heads // shared) for run in runs]
        needed = [sorted({*numbers}) for numbers in used]
        q = self._collect(query, runs)
        k, v = (self._collect(part, needed) for part in (key, value))

        # Attention takes equally many queries' heads for each of the keys', or one.
        mine, own = used[self.group.rank], needed[self.group.rank]
        if len({mine.count(number) for number in own}) > 1:
            places = _move(tuple(number - own[0] for number in mine), k.device)
            k, v = k.index_select(1, places), v.index_select(1, places)
        return q, k, v

    def scatter_tokens(self, out: Tensor, heads: int) -> Tensor:
        """Return this rank's tokens of all heads, `[batch, tokens, heads, head size]`.

        Args:
            out: all tokens of this rank's heads, `[batch, all tokens, own heads, head size]`.
            heads: number of all heads.
        """
        size, (batch, total, own, width) = self.group.size, out.shape
        tokens = total // size
        apart = out.view(batch, tokens, size, own, width).permute(2, 0, 1, 3, 4)
        counts = [len(run) for run in divide_heads(heads, size)]
        sent = [batch * tokens * own * width] * size
        received = [batch * tokens * count * width for count in counts]
        got = _swap(apart.reshape(-1), sent, received, self.group)
        parts = [
            part.view(batch, tokens, count, width)
            for part, count in zip(got.split(received), counts, strict=True)
        ]
        return torch.cat(parts, dim=2)

    def _collect(self, part: Tensor, heads: Sequence[Sequence[int]]) -> Tensor:
        """Return all tokens of this rank's heads, `[batch, own heads, all tokens, head size]`.

        Args:
            part: this rank's tokens of all heads, `[batch, heads, tokens, head size]`.
            heads: the heads of each rank.
        """
        size, (batch, total, tokens, width) = self.group.size, part.shape
        own, one = len(heads[self.group.rank]), batch * tokens * width
        order = tuple(number for numbers in heads for number in numbers)
        apart = part.transpose(0, 1)
        if order != tuple(range(total)):  # a head that several ranks need
            apart = apart.index_select(0, _move(order, part.device))
        sent, received = [len(numbers) * one for numbers in heads], [own * one] * size
        got = _swap(apart.reshape(-1), sent, received, self.group)

        # Token i of rank r is number i·n + r of all.
        got = got.view(size, own, batch, tokens, width).permute(2, 1, 3, 0, 4)
        return got.reshape(batch, own, tokens * size, width)


@functools.cache
def divide_heads(heads: int, size: int) -> tuple[range, ...]:
    """Return the heads of each of `size` ranks, as equally many as can be.

    Raises:
        ValueError: there are fewer heads than ranks.
    """
    if heads < size:
        raise ValueError(f"its attention has {heads} heads, and each of {size} ranks needs one")
    return tuple(range(r * heads // size, (r + 1) * heads // size) for r in range(size))


def find_shared(run: Sequence[int], each: int) -> list[int]:
    """Return the head of keys and values of each head of queries, where `each` share one."""
    return [head // each for head in run]


@functools.lru_cache(maxsize=64)
def _move(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers on a device; moved once for all layers."""
    return torch.tensor(numbers, device=device)


def _swap(parts: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    swapped: Tensor = _Swap.apply(parts, sent, received, group)  # type: ignore[no-untyped-call]
    return swapped


class _Swap(torch.autograd.Function):
    """Send each rank its part of a flat tensor; gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: Any, parts: Tensor, sent: list[int], received: list[int], group: Group
    ) -> Tensor:
        ctx.back = received, sent, group
        return _send(parts, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _send(gradient.contiguous(), *ctx.back), None, None, None


def _send(parts: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    got = parts.new_empty(sum(received))
    dist.all_to_all_single(got, parts, received, sent, group=group.device_group)
    return got
