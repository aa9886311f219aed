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
These two take whole logits and are the definition; `ds_kd.distillation` computes the same from
hidden states, a chunk at a time.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

#: What a loss reports beside the differentiable sum, in this order; each is summed over valid
#: tokens.
SUMS = ("ce_loss", "kd_loss", "top1_agreement", "teacher_entropy")


class MaskedCrossEntropy:
    """Cross-entropy of the student against the labels, summed over valid tokens.

    Args:
        ignore_index: label value of positions that are not supervised.
        fp32_upcast: compute the log-softmax in fp32 whatever the logits' dtype; false is heeded
            with `chunk_size` 0 only, as a chunk in fp32 costs next to nothing.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, fp32_upcast: bool = True):
        self.ignore_index = ignore_index
        self.fp32_upcast = fp32_upcast

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`logits` `[tokens, vocab]`, `labels` `[tokens]` int64 → scalar, nats, summed over valid
        tokens."""
        if self.fp32_upcast:
            logits = logits.float()
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")


class KDLoss:
    """T²·KL(teacher ‖ student), summed over valid tokens (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        ignore_index: label value of positions that are not distilled.
        temperature: T > 0, divides both models' logits.
        fp32_upcast: as for `MaskedCrossEntropy`.
        chunk_size: tokens whose logits exist at one time, CE's included; None chooses, 0 makes all
            logits at once.

    Raises:
        ValueError: temperature is not a positive number, or chunk_size is not an integer ≥ 0.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        chunk_size: int | None = None,
    ):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 0):
            raise ValueError(f"chunk_size must be an integer ≥ 0 (tokens), got {chunk_size!r}")
        self.ignore_index = ignore_index
        self.temperature = float(temperature)
        self.fp32_upcast = fp32_upcast
        self.chunk_size = chunk_size

    def log_probs(self, logits: Tensor) -> Tensor:
        """`[tokens, vocab]` logits → log-softmax at this temperature."""
        if self.fp32_upcast:
            logits = logits.float()
        return F.log_softmax(logits / self.temperature, dim=-1)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Both logits `[tokens, vocab]`, `labels` `[tokens]` int64 (only its mask is used) →
        scalar, nats."""
        valid = labels != self.ignore_index
        student = self.log_probs(student_logits[valid])
        teacher = self.log_probs(teacher_logits[valid])
        # kl_div(input=log q, target=log p) is KL(p ‖ q): the teacher is the target.
        kl = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return kl * self.temperature**2
