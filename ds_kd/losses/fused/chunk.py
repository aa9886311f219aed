"""CE and a divergence of a chunk by one kernel, where there is one for the divergence.

The forward KL has its own (`forward_kl.py`); others that are sums over the vocabulary come from a
template (`terms.py`). These stay with the plain code: `adaptive_kl` and `top_k`, which look for the
teacher's likeliest ids; `acceptance`, whose overlap may be less than fp32 holds and so needs a
maximum of its own; and lists of several divergences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.fused import forward_kl, terms
from ds_kd.losses.pair import HIGH_TEMPERATURE


def can_fuse(divergence: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel computes CE and this divergence from logits of this dtype."""
    kind: Any = type(divergence)
    # A subclass, which may change the formula, inherits the mark and does not have it itself.
    if not vars(kind).get("fuses", False) or not forward_kl.can_run(device, dtype):
        return False
    if divergence.name == "forward_kl":
        return True
    # Above it the plain code takes fp64, in which GPUs are slow.
    is_exact = divergence.temperature <= HIGH_TEMPERATURE
    return is_exact and (device.type == "meta" or terms.works(kind, device))


def distil(
    divergence: Any, student: Tensor, teacher: Tensor, labels: Tensor, alpha: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return values by name, each `[tokens, 1]`, and the gradient, which lies where the student's
    logits were; see `forward_kl.distil_rows`. The divergence is multiplied by T²."""
    t = divergence.temperature
    if divergence.name == "forward_kl":
        return forward_kl.distil(student, teacher, labels, t, alpha)
    own = terms.arguments_of(divergence)
    found = terms.distil_rows_by(student, teacher, labels, t, alpha, divergence.name, own)
    values = dict(zip(terms.COLUMNS, found.split(1, dim=1), strict=True))
    return values | {"kd_loss": values["kd_loss"] * t**2}, student
