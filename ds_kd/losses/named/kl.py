"""Divergences of the Kullback-Leibler family beside the forward one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.divergences import Divergence
from ds_kd.losses.pair import Pair

#: Tokens among which the head is looked for first, and how their number grows.
_FIRST, _TIMES = 64, 8


class ReverseKL(Divergence):
    """T²·KL(student ‖ teacher): the student avoids what the teacher holds to be improbable.

    With r = log q - log p, KL = Σ q·r and its gradient is q∘(r - KL). MiniLLM, Gu et al. 2023,
    arXiv:2306.08543.
    """

    name = "reverse_kl"
    fuses = True

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        value = (pair.q * pair.log_ratio).sum(-1, keepdim=True)
        return value, pair.q * (pair.log_ratio - value)


class AdaptiveKL(Divergence):
    """T²·(w·KL(p ‖ q) + (1 - w)·KL(q ‖ p)), with a weight w for each token.

    w is the part of Σ|p - q| that falls on the teacher's head: its likeliest ids, as long as their
    probabilities sum up to `head` at most, and always the likeliest one. w has no gradient. Wu et
    al. 2024, arXiv:2404.02657.

    Args:
        head: probability of the head, between 0 and 1.
        common: arguments of `Divergence`.
    """

    name = "adaptive_kl"
    limits = (("head", 0, 1),)

    def __init__(self, head: float = 0.5, **common: Any):
        super().__init__(**common)
        self.head = self.within("head", head)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q, r = log_p.exp(), log_q.exp(), log_q - log_p
        w = self._weigh(p, q.detach())[:, 0]
        return w * -(p * r).sum(-1) + (1.0 - w) * (q * r).sum(-1)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        p, q, r = pair.p, pair.q, pair.log_ratio
        w = self._weigh(p, q)
        forward, reverse = -(p * r).sum(-1, keepdim=True), (q * r).sum(-1, keepdim=True)
        gradient = w * (q - p) + (1.0 - w) * q * (r - reverse)
        return w * forward + (1.0 - w) * reverse, gradient

    def _weigh(self, p: Tensor, q: Tensor) -> Tensor:
        """Return w `[tokens, 1]`; 1/2 where the models are the same."""
        gap = (p - q).abs()
        whole = gap.sum(-1, keepdim=True)
        on_head = torch.where(p >= _find_least(p, self.head), gap, 0.0).sum(-1, keepdim=True)
        return torch.where(whole > 0, on_head / whole, 0.5)


def _find_least(p: Tensor, head: float) -> Tensor:
    """Return the least probability of each token's head, `[tokens, 1]`.

    A head has few ids as a rule, so that more are looked at for those tokens only that need them.
    """
    vocab, count = p.shape[1], min(_FIRST, p.shape[1])
    least = torch.empty_like(p[:, :1])
    rows = torch.arange(len(p), device=p.device)
    while len(rows):
        top = p[rows].topk(count).values
        inside = top.cumsum(-1) <= head
        inside[:, 0] = True
        is_done = ~inside[:, -1] | (count == vocab)
        last = top.gather(1, inside.sum(-1, keepdim=True) - 1)
        least[rows[is_done]] = last[is_done]
        rows, count = rows[~is_done], min(_TIMES * count, vocab)
    return least
