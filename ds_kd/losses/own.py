"""Adapters for a user's own loss, a function of whole logits that returns the sum over tokens. As
it is a sum, computing it a chunk at a time is exact; autograd gives the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.pair import Pair


class OwnDivergence:
    """Adapter for `loss(student_logits, teacher_logits, labels)`; see `contract.check_divergence`.

    A temperature and its square are the business of the loss itself; here T is 1.
    """

    temperature = 1.0
    takes_whole_chunks = True
    reads_teacher_logits = True

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.loss = loss
        self.chunk_size: int | None = getattr(loss, "chunk_size", None)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return values and gradient, as `Divergence.of_chunk`; the values are the chunk's mean."""
        return _differentiate(
            lambda rows, z: self.loss(z, pair.teacher[rows], pair.labels[rows]),
            pair.student,
            pair.labels,
        )


class OwnCrossEntropy:
    """Adapter for `loss(student_logits, labels)`; see `contract.check_cross_entropy`."""

    leaves_one_hot_out = False

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        self.loss = loss

    def of_chunk(
        self, logits: Tensor, largest: Tensor, labels: Tensor, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        """Return values and gradient, as `MaskedCrossEntropy.of_chunk`."""
        return _differentiate(lambda rows, z: self.loss(z, labels[rows]), logits, labels)


def adapt(loss: Any, adapter: Callable[[Any], Any]) -> Any:
    """Return the loss itself if it has `of_chunk`, else the adapter around it."""
    return loss if hasattr(loss, "of_chunk") else adapter(loss)


def _differentiate(
    evaluate: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean over valid tokens for every token, `[tokens, 1]`, and the sum's gradient."""
    rows = (labels != IGNORE_INDEX).nonzero().flatten()
    gradient = torch.zeros_like(logits)
    if not len(rows):
        return logits.new_zeros(len(logits), 1), gradient
    with torch.enable_grad():
        z = logits[rows].detach().requires_grad_()
        value = evaluate(rows, z)
        (slope,) = torch.autograd.grad(value, z)
    gradient[rows] = slope.to(gradient.dtype)
    return (value.detach().to(logits.dtype) / len(rows)).expand(len(logits), 1), gradient
