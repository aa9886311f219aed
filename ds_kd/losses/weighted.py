"""A weighted sum of divergences, each at its own temperature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.own import OwnDivergence, adapt
from ds_kd.losses.pair import Pair


class Weighted:
    """Σ w·T²·D of several losses, in the interface of a `Divergence`.

    Its own `temperature` is the highest of theirs.

    Args:
        parts: (weight, loss) of each: a `Divergence`, or a user's own loss of whole logits.

    Raises:
        ValueError: two of them want another chunk_size.
    """

    takes_whole_chunks = False
    reads_teacher_logits = True

    def __init__(self, parts: Iterable[tuple[float, Any]]):
        self.parts = [(weight, loss, adapt(loss, OwnDivergence)) for weight, loss in parts]
        adapted = [part for *_, part in self.parts]
        self.temperature: float = max(part.temperature for part in adapted)
        sizes = {part.chunk_size for part in adapted} - {None}
        if len(sizes) > 1:
            raise ValueError(f"chunk_size must be the same everywhere, got {sorted(sizes)}")
        self.chunk_size: int | None = next(iter(sizes), None)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return Σ w·T²·D, summed over valid tokens, as `Divergence.__call__`."""
        values = [w * loss(student_logits, teacher_logits, labels) for w, loss, _ in self.parts]
        return torch.stack(values).sum()

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return values and gradient, as `Divergence.of_chunk`, at the highest temperature."""
        values, gradient = torch.zeros_like(pair.student[:, :1]), torch.zeros_like(pair.student)
        for weight, _, part in self.parts:
            ratio = part.temperature / self.temperature
            value, slope = part.of_chunk(pair.at(part.temperature))
            values.add_(value, alpha=weight * ratio**2)
            gradient.add_(slope, alpha=weight * ratio)
        return values, gradient
