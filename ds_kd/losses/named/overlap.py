"""Losses of the overlap Σ min(p, q): the share of the student's tokens that speculative decoding
keeps (Leviathan et al. 2023, arXiv:2211.17192), or what it lacks of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kd.losses.divergences import Divergence
from ds_kd.losses.pair import Pair


class TVD(Divergence):
    """T²·½·Σ|q - p|, the total variation distance: 1 less the overlap.

    g = ½·sign(q - p). Wen et al. 2023, arXiv:2307.15190.
    """

    name = "tvd"
    fuses = True

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        difference = pair.q - pair.p
        value = 0.5 * difference.abs().sum(-1, keepdim=True)
        sign = difference.sign()
        return value, 0.5 * pair.q * (sign - (pair.q * sign).sum(-1, keepdim=True))


class Acceptance(Divergence):
    """-T²·log A with the overlap A = Σ min(p, q).

    With u = q/A where q < p and 0 elsewhere, the gradient is q·Σu - u. It is the total variation's
    over A, and so does not fade where the models hardly overlap. LK losses, Samarin et al. 2026,
    arXiv:2602.23881.
    """

    name = "acceptance"

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -_find_log_overlap(log_p, log_q - log_p)[:, 0]

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        log_p, r = pair.log_p, pair.log_ratio
        log_overlap = _find_log_overlap(log_p, r)
        u = torch.where(r < 0, torch.exp(log_p + r.clamp(max=0) - log_overlap), 0.0)
        return -log_overlap, pair.q * u.sum(-1, keepdim=True) - u


def _find_log_overlap(log_p: Tensor, r: Tensor) -> Tensor:
    """Return log Σ min(p, q) `[tokens, 1]`, exactly 0 where r = log q - log p is.

    Near 1 the overlap is 1 less what it lacks; far below it would be lost in that difference, and
    below the least number there is in the sum itself.
    """
    below = r.clamp(max=0)
    lack = -(log_p.exp() * torch.expm1(below)).sum(-1, keepdim=True)
    far = torch.logsumexp(log_p + below, -1, keepdim=True)
    return torch.where(lack < 0.5, torch.log1p(-lack.clamp(max=0.5)), far)
