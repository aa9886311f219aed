"""The forward KL of the teacher's likeliest ids and the rest as one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.divergences import Divergence
from ds_kd.losses.pair import Pair


class TopK(Divergence):
    """T²·KL(p ‖ q) over k + 1 bins: the teacher's k likeliest ids, and all others together.

    The gradient is q - p̃, where p̃ is p on the k ids and elsewhere q, scaled to the teacher's tail:
    the student divides its tail as it likes. Without the last bin the student would be free to put
    its probability anywhere else.

    Args:
        k: number of ids, at least 1.
        common: arguments of `Divergence`.
    """

    name = "top_k"
    limits = (("k", 0, None),)

    def __init__(self, k: int = 64, **common: Any):
        super().__init__(**common)
        if type(k) is not int:
            raise ValueError(f"k must be an integer, got {k!r}")
        self.k = int(self.within("k", k))

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self._compare(log_p, log_q)[0]

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        log_p, log_q = pair.log_p, pair.log_q
        value, ids, of_tail = self._compare(log_p, log_q)
        wanted = (log_q + of_tail[:, None]).scatter_(1, ids, log_p.gather(1, ids))
        return value[:, None], log_q.exp() - wanted.exp()

    def _compare(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value `[tokens]`, the k ids `[tokens, k]`, and the logarithm of the teacher's
        tail over the student's `[tokens]`."""
        ids = log_p.topk(min(self.k, log_p.shape[1])).indices
        top_p, top_q = log_p.gather(1, ids), log_q.gather(1, ids)
        value = (top_p.exp() * (top_p - top_q)).sum(-1)
        if ids.shape == log_p.shape:  # there is no tail
            return value, ids, value.new_zeros(len(value))
        tail_p, tail_q = (
            torch.logsumexp(log.scatter(1, ids, -math.inf), -1) for log in (log_p, log_q)
        )
        return value + tail_p.exp() * (tail_p - tail_q), ids, tail_p - tail_q
