"""Divergences from a mixture of both distributions, which are bounded whatever the models say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.divergences import Divergence
from ds_kd.losses.pair import Pair

_FAR = 80.0  # |r| beyond which the smaller of two probabilities is nothing beside the other


def log_of_mixture(r: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return log(m/q) and log(m/p) of the mixture m = share·p + (1 - share)·q.

    Args:
        r: log q - log p, `[tokens, vocab]`.
        share: the teacher's share, between 0 and 1.

    Returns:
        Both `[tokens, vocab]`, exactly 0 where r is.
    """
    near = r.clamp(-_FAR, _FAR)
    of_q = torch.log1p(share * torch.expm1(-near))
    return of_q, of_q + near


class JSD(Divergence):
    """T²·(β·KL(p ‖ m) + (1 - β)·KL(q ‖ m)) with m = β·p + (1 - β)·q.

    The gradient is (1 - β)·q∘(log(q/m) - KL(q ‖ m)). Towards β = 0 and 1 the value itself vanishes.
    GKD, Agarwal et al. 2023, arXiv:2306.13649.

    Args:
        beta: share β of the teacher in the mixture, between 0 and 1.
        common: arguments of `Divergence`.
    """

    name = "jsd"
    fuses = True
    limits = (("beta", 0, 1),)

    def __init__(self, beta: float = 0.5, **common: Any):
        super().__init__(**common)
        self.beta = self.within("beta", beta)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        of_q, of_p = log_of_mixture(log_q - log_p, self.beta)
        p_part, q_part = (log_p.exp() * of_p).sum(-1), (log_q.exp() * of_q).sum(-1)
        return -self.beta * p_part - (1.0 - self.beta) * q_part

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        of_q, of_p = log_of_mixture(pair.log_ratio, self.beta)
        p_part = (pair.p * of_p).sum(-1, keepdim=True)
        q_part = (pair.q * of_q).sum(-1, keepdim=True)
        gradient = (self.beta - 1.0) * pair.q * (of_q - q_part)
        return -self.beta * p_part - (1.0 - self.beta) * q_part, gradient


class SkewForward(Divergence):
    """T²·KL(p ‖ m) with m = a·p + (1 - a)·q: the forward KL, at most log(1/a).

    g = -(1 - a)·(p/m - 1). DistiLLM, Ko et al. 2024, arXiv:2402.03898.

    Args:
        skew: share a of the teacher in the mixture, between 0 and 1.
        common: arguments of `Divergence`.
    """

    name = "skew_forward"
    fuses = True
    limits = (("skew", 0, 1),)

    def __init__(self, skew: float = 0.1, **common: Any):
        super().__init__(**common)
        self.skew = self.within("skew", skew)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        _, of_p = log_of_mixture(log_q - log_p, self.skew)
        return -(log_p.exp() * of_p).sum(-1)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        _, of_p = log_of_mixture(pair.log_ratio, self.skew)
        g = (self.skew - 1.0) * torch.expm1(-of_p)
        return -(pair.p * of_p).sum(-1, keepdim=True), pull_back(pair.q, g)


class SkewReverse(Divergence):
    """T²·KL(q ‖ m) with m = (1 - a)·p + a·q: the reverse KL, at most log(1/a).

    g = log(q/m) - a·(q/m - 1). DistiLLM, Ko et al. 2024, arXiv:2402.03898.

    Args:
        skew: share a of the student in the mixture, between 0 and 1.
        common: arguments of `Divergence`.
    """

    name = "skew_reverse"
    fuses = True
    limits = (("skew", 0, 1),)

    def __init__(self, skew: float = 0.1, **common: Any):
        super().__init__(**common)
        self.skew = self.within("skew", skew)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        of_q, _ = log_of_mixture(log_q - log_p, 1.0 - self.skew)
        return -(log_q.exp() * of_q).sum(-1)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        of_q, _ = log_of_mixture(pair.log_ratio, 1.0 - self.skew)
        g = -of_q - self.skew * torch.expm1(-of_q)
        return -(pair.q * of_q).sum(-1, keepdim=True), pull_back(pair.q, g)


def pull_back(q: Tensor, g: Tensor) -> Tensor:
    """Return q∘(g - Σ q·g), the gradient with respect to logits of one with respect to q."""
    return q * (g - (q * g).sum(-1, keepdim=True))
