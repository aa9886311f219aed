"""The two losses of knowledge distillation: pure torch, no engine, no config.

    L = (1 - α)·CE(student, labels) + α·T²·KL( softmax(z_t/T) ‖ softmax(z_s/T) )

* **Direction.** KL(teacher ‖ student), the *forward* KL of Hinton et al. (2015): the student must
  put probability wherever the teacher does. The reverse direction looks alike on paper and trains
  another model.
* **T².** d KL/d z_s = (softmax(z_s/T) - softmax(z_t/T))/T, and the difference itself shrinks like
  1/T: together 1/T². Multiplying by T² keeps the gradient's scale, hence the learning rate,
  independent of T (Hinton et al. 2015, section 2).
* **Sums, not means.** Every loss returns the sum over the valid tokens it was given. A step is cut
  into micro-batches and ranks with unequal numbers of valid tokens; only sum / global count is
  independent of how it was cut. The one division is the trainer's.
* **A zero with a graph.** No valid token gives a sum over nothing: exactly 0, still connected to
  the student, so that ZeRO-3's backward collectives run on every rank.

Labels arrive already shifted: `labels[i]` is the token that position `i` must predict.
These two take whole logits and are the definition; `ds_kd.losses.chunked` computes the same from
hidden states, a chunk at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kd.data.labels import IGNORE_INDEX

# Above this temperature the KL is about 1/T² small, and the difference of two log-sum-exps about
# ten: what fp32 keeps of the difference is no longer enough.
_HIGH_TEMPERATURE = 8.0
_NEAR = 0.5  # |log-ratio| up to which `near_kl`'s series is exact to 1e-5


class MaskedCrossEntropy:
    """Cross-entropy of the student against the labels, summed over valid tokens.

    Args:
        ignore_index: label value of positions that are not supervised; -100 is the only one, as
            data sets, token counts and losses must agree on it.
        fp32_upcast: compute the log-softmax in fp32 whatever the logits' dtype; false is heeded
            with `chunk_size` 0 only, as a chunk in fp32 costs next to nothing.

    Raises:
        ValueError: another ignore_index.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, fp32_upcast: bool = True):
        _check_ignore_index(ignore_index)
        self.fp32_upcast = fp32_upcast

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`logits` `[tokens, vocab]`, `labels` `[tokens]` int64 → scalar, nats, summed over valid
        tokens."""
        if self.fp32_upcast:
            logits = logits.float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


class KDLoss:
    """T²·KL(teacher ‖ student), summed over valid tokens (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        ignore_index: as for `MaskedCrossEntropy`.
        temperature: T > 0, divides both models' logits.
        fp32_upcast: as for `MaskedCrossEntropy`.
        chunk_size: tokens whose logits exist at one time, CE's included; None chooses, 0 makes all
            logits at once.

    Raises:
        ValueError: another ignore_index, a temperature that is not a positive number, or a
            chunk_size that is not an integer ≥ 0.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        chunk_size: int | None = None,
    ):
        _check_ignore_index(ignore_index)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 0):
            raise ValueError(f"chunk_size must be an integer ≥ 0 (tokens), got {chunk_size!r}")
        self.temperature = float(temperature)
        self.fp32_upcast = fp32_upcast
        self.chunk_size = chunk_size

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Both logits `[tokens, vocab]`, `labels` `[tokens]` int64 (only its mask is used) →
        scalar, nats."""
        valid = labels != IGNORE_INDEX
        student, teacher = student_logits[valid], teacher_logits[valid]
        if self.fp32_upcast:
            student, teacher = student.float(), teacher.float()
        student, teacher = student / self.temperature, teacher / self.temperature
        log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        # kl_div(input=log q, target=log p) is KL(p ‖ q): the teacher is the target.
        if not is_high(self.temperature):
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            return kl * self.temperature**2
        plain = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, keepdim=True)
        return near_kl(student - teacher, log_p.exp(), plain).sum() * self.temperature**2


def is_high(temperature: float) -> bool:
    """Whether the KL at this temperature needs `near_kl`."""
    return temperature > _HIGH_TEMPERATURE


def near_kl(difference: Tensor, p: Tensor, otherwise: Tensor) -> Tensor:
    """KL(p ‖ q) of distributions that nearly agree, without cancellation.

    With d the difference less its mean under p, KL = log(1 + Σ p·(e^d - 1 - d)): no term of the
    sum is negative, and an error of the mean enters squared only. e^d - 1 - d is its power series.

    Args:
        difference: (z_s - z_t)/T `[rows, vocab]`.
        p: the teacher's probabilities `[rows, vocab]`.
        otherwise: the KL by its definition `[rows, 1]`, for rows whose log-ratios are large.

    Returns:
        `[rows, 1]`, nats.
    """
    d = difference - (p * difference).sum(-1, keepdim=True)
    is_near = d.detach().abs().amax(-1, keepdim=True) <= _NEAR
    d = d.clamp(-_NEAR, _NEAR)  # of rows not chosen: nothing infinite reaches a gradient
    series = 1 / 24 + d * (1 / 120 + d / 720)
    series = d * d * (0.5 + d * (1 / 6 + d * series))
    return torch.where(is_near, torch.log1p((p * series).sum(-1, keepdim=True)), otherwise)


def _check_ignore_index(value: int) -> None:
    if value != IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be {IGNORE_INDEX}, got {value}: data sets mark what is not "
            f"supervised with {IGNORE_INDEX}, and tokens are counted by it"
        )
