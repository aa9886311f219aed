"""The loss of knowledge distillation: pure torch, no engine, no config.

    L = (1 - α)·CE(student, labels) + α·T²·KL( softmax(z_t/T) ‖ softmax(z_s/T) )

* **Direction.** KL(teacher ‖ student), the *forward* KL of Hinton et al. (2015): the student must
  put probability wherever
  the teacher does. The reverse direction looks alike on paper and trains another model.
* **T².** d KL/d z_s = (softmax(z_s/T) - softmax(z_t/T))/T, and the difference itself shrinks like
  1/T: together 1/T².
  Multiplying by T² keeps the gradient's scale, hence the learning rate, independent of T (Hinton et
  al. 2015, section 2).
* **Sums, not means.** Every loss returns the sum over the valid tokens it was given. A step is cut
  into micro-batches and
  ranks with unequal numbers of valid tokens; only sum / global count is independent of how it was
  cut. The one division
  is the trainer's.
* **A zero with a graph.** No valid token gives a sum over nothing: exactly 0, still connected to
  the student, so that
  ZeRO-3's backward collectives run on every rank.

Labels arrive already shifted: `labels[i]` is the token that position `i` must predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
        fp32_upcast: compute the log-softmax in fp32 whatever the logits' dtype.
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
        fp32_upcast: compute both log-softmaxes in fp32 whatever the logits' dtype.

    Raises:
        ValueError: temperature is not positive.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
    ):
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.ignore_index = ignore_index
        self.temperature = float(temperature)
        self.fp32_upcast = fp32_upcast

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


@dataclass(frozen=True)
class Head:
    """A language-model head as plain numbers: `softcap·tanh(scale·(h Wᵀ + b)/softcap)`.

    Args:
        weight: `[vocab, hidden]`.
        bias: `[vocab]` or None.
        scale: multiplies the logits (Cohere's `logit_scale`, the inverse of Granite's
            `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocab_size: int | None = None) -> Tensor:
        """`hidden` `[tokens, hidden]` → `[tokens, vocab_size]`; rows of the head beyond
        `vocab_size` are left out."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        out = F.linear(hidden, self.weight[:vocab_size], bias)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out


class DistillationLoss:
    """(1 - α)·CE + α·KD from hidden states, so that only supervised rows ever meet a head.

    Args:
        ce: cross-entropy of the student, a sum over valid tokens.
        kd: distillation loss, a sum over valid tokens; it multiplies by T² itself.
        kd_ratio: α in [0, 1]. At 0 the teacher is not used at all, at 1 the labels' values are not
            (their mask is).
        vocab_size: number of ids both models share, where their padded heads differ; None takes the
            heads as they are.
    """

    def __init__(
        self,
        ce: MaskedCrossEntropy,
        kd: KDLoss,
        kd_ratio: float,
        vocab_size: int | None = None,
    ):
        if not 0.0 <= kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}")
        self.ce, self.kd, self.kd_ratio, self.vocab_size = ce, kd, float(kd_ratio), vocab_size

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: Head,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and its parts.

        Args:
            student_hidden: `[tokens, student hidden size]`, with a graph.
            student_head: the student's head.
            labels: `[tokens]` int64, shifted.
            teacher_hidden: `[tokens, teacher hidden size]`, no graph; None at `kd_ratio` 0.
            teacher_head: the teacher's head, with `teacher_hidden`.

        Returns:
            The differentiable scalar (nats, summed over valid tokens) and a detached `[4]` fp32
            tensor of `SUMS`.
        """
        student_logits = student_head.logits(student_hidden, self.vocab_size)
        if teacher_hidden is None or teacher_head is None:
            ce = self.ce(student_logits, labels)
            zero = torch.zeros((), device=ce.device)
            return ce, torch.stack([ce.detach().float(), zero, zero, zero])
        with torch.no_grad():
            teacher_logits = teacher_head.logits(teacher_hidden, self.vocab_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_ratio < 1.0):
            ce = self.ce(student_logits, labels)
        kd = self.kd(student_logits, teacher_logits, labels)
        loss = kd if self.kd_ratio == 1.0 else (1.0 - self.kd_ratio) * ce + self.kd_ratio * kd
        return loss, self._sums(ce, kd, student_logits, teacher_logits, labels)

    @torch.no_grad()
    def _sums(
        self, ce: Tensor, kd: Tensor, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        valid = labels != self.ce.ignore_index
        log_p = self.kd.log_probs(teacher_logits[valid])
        entropy = -(log_p.exp() * log_p).sum()
        agree = student_logits.argmax(-1).eq(teacher_logits.argmax(-1))[valid].sum()
        return torch.stack([ce.float(), kd.float(), agree.float(), entropy.float()])
