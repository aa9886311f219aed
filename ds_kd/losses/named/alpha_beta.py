"""The α-β-divergence, between and beyond the forward and the reverse KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.divergences import Divergence
from ds_kd.losses.pair import Pair


class AlphaBeta(Divergence):
    """-T²/(αβ)·Σ [p^α·q^β - α/s·p^s - β/s·q^s] with s = α + β.

    With u = (q^s - p^α·q^β)/α the gradient is u - q·Σu. α = 1, β → 0 tends to the forward KL, and
    α → 0, β = 1 to the reverse KL. ABKD, Wang et al. 2025, arXiv:2505.04560.

    Args:
        alpha: power α > 0; a larger one weighs ids by how far the models differ on them.
        beta: power β > 0; a larger one weighs ids by the student's own probability.
        common: arguments of `Divergence`.
    """

    name = "alpha_beta"
    fuses = True
    limits = (("alpha", 0, None), ("beta", 0, None))

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **common: Any):
        super().__init__(**common)
        self.alpha, self.beta = self.within("alpha", alpha), self.within("beta", beta)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self._evaluate(log_q, log_q - log_p)[0]

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        value, u = self._evaluate(pair.log_q, pair.log_ratio)
        return value[:, None], u - pair.q * u.sum(-1, keepdim=True)

    def _evaluate(self, log_q: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value `[tokens]` and u `[tokens, vocab]`, both exactly 0 where r is.

        All powers are taken relative to those of the larger of p and q, so that none overflows, and
        all differences of powers by expm1.
        """
        a, b, s = self.alpha, self.beta, self.alpha + self.beta
        above, below = r.clamp(min=0), (-r).clamp(min=0)  # one of the two is 0
        larger = torch.exp(s * (log_q + below))
        upper = torch.expm1(-a * above) - a / s * torch.expm1(-s * above)
        lower = torch.expm1(-b * below) - b / s * torch.expm1(-s * below)
        value = -(larger * (upper + lower)).sum(-1) / (a * b)
        u = torch.expm1(-a * below) * torch.exp(-b * below) - torch.expm1(-a * above)
        return value, larger * u / a
