"""(1 - α)·CE + α·KD from hidden states, a chunk of tokens at a time: pure torch.

`[tokens, vocab]` logits are the largest tensors of a distillation step: at 4,096 tokens and 128k
words one fp32 copy takes 2 GB, and the plain computation keeps about six. Here both heads are
applied to a few hundred tokens at a time, and the gradients with respect to the student's hidden
states and head are taken at once, while the chunk's logits are there. Nothing of vocabulary size
but the head's own gradient outlives a chunk, no logit is computed twice, and the buffers of one
chunk serve the next.

With q = softmax(z_s), q_T = softmax(z_s/T), p = softmax(z_t/T) and y the label:

    d/dz_s [ (1 - α)·CE + α·T²·KL ] = (1 - α)·(q - onehot(y)) + α·T·(q_T - p)

q runs over the student's whole head, as transformers computes its loss; q_T and p run over the ids
that both models share, where their heads are padded to different sizes.

The idea of taking a loss's gradient in its forward is Liger Kernel's (Hsu et al. 2024,
arXiv:2410.10989); here it covers both losses and both heads under ZeRO-3's hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.losses.chunk import Buffers, compare_chunk, cross_entropy
from ds_kd.losses.divergences import KDLoss, MaskedCrossEntropy

# Tokens in a chunk where `chunk_size` does not say. Fewer make the matrix products narrow and add
# to the head's gradient more often; more only take room (docs/performance.md). A GPU needs more to
# be busy.
_CHUNK, _CHUNK_ON_GPU = 512, 2048
#: Sums over valid tokens that are reported beside the loss: always, with a teacher, and with a
#: teacher where no gradient is wanted (validation); the last whatever the run's temperature is.
_OF_STUDENT = ("ce_loss",)
_OF_BOTH = (*_OF_STUDENT, "kd_loss", "top1_agreement", "teacher_entropy")
_AT_T1 = ("kl_at_t1", "teacher_entropy_at_t1", "student_entropy_at_t1")


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

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` `[tokens, hidden]` → `[tokens, vocab]`."""
        out = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out


def chunk_of(device: str) -> int:
    """Tokens of a chunk where the config does not say; on a kind of device."""
    return _CHUNK if device == "cpu" else _CHUNK_ON_GPU


class DistillationLoss:
    """(1 - α)·CE + α·KD from hidden states, so that only supervised rows ever meet a head.

    Args:
        ce: cross-entropy of the student, a sum over valid tokens.
        kd: distillation loss, a sum over valid tokens; it multiplies by T² itself, and its
            `chunk_size` says how many tokens' logits exist at one time.
        kd_ratio: α in [0, 1]. At 0 a teacher is measured against only, at 1 the labels' values are
            not used (their mask is).
        vocab_size: number of ids both models share, where their padded heads differ: KD is over
            these, CE over the student's whole head. None takes the heads as they are.

    A chunk is computed in fp32 whatever the losses' `fp32_upcast` says. Other losses than
    `MaskedCrossEntropy` and `KDLoss` get whole logits.

    Raises:
        ValueError: `kd_ratio` out of range.
    """

    def __init__(
        self,
        ce: Callable[[Tensor, Tensor], Tensor],
        kd: Callable[[Tensor, Tensor, Tensor], Tensor],
        kd_ratio: float,
        vocab_size: int | None = None,
    ):
        if not 0.0 <= kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}")
        self.ce, self.kd, self.kd_ratio, self.vocab_size = ce, kd, float(kd_ratio), vocab_size
        self.temperature = kd.temperature if isinstance(kd, KDLoss) else 1.0
        self._chunk_size: int | None = 0
        if type(ce) is MaskedCrossEntropy and type(kd) is KDLoss:
            self._chunk_size = kd.chunk_size
        self._kept: Buffers | None = None

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: Head,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss and its parts.

        Args:
            student_hidden: `[tokens, student hidden size]`, with a graph.
            student_head: the student's head.
            labels: `[tokens]` int64, shifted.
            teacher_hidden: `[tokens, teacher hidden size]`, no graph; may be None at `kd_ratio` 0.
            teacher_head: the teacher's head, with `teacher_hidden`.

        Returns:
            The differentiable scalar (nats, summed over valid tokens), whose backward can be run
            once, and detached sums over valid tokens by name. Which there are depends on whether
            there is a teacher and on whether gradients are enabled, so it is the same on all ranks.
        """
        if self._chunk_size == 0:
            return self._plain(student_hidden, student_head, labels, teacher_hidden, teacher_head)
        names = self._names(teacher_hidden is not None)
        total, sums = _Chunked.apply(  # type: ignore[no-untyped-call]
            student_hidden,
            student_head.weight,
            student_head.bias,
            student_head,
            labels,
            teacher_hidden,
            teacher_head,
            self,
            # Inside a Function grad mode is off, and needs_input_grad does not know of no_grad.
            torch.is_grad_enabled(),
            len(names),
        )
        return total, dict(zip(names, sums.unbind(), strict=True))

    def weigh(self, ce: Tensor, kd: Tensor | None) -> Tensor:
        """The optimised sum: (1 - α)·CE + α·KD, or CE alone without a teacher."""
        alpha = 0.0 if kd is None else self.kd_ratio
        # 0·inf is NaN: a part that is not optimised must not spoil the one that is.
        terms = [w * s for w, s in ((1.0 - alpha, ce), (alpha, kd)) if w > 0 and s is not None]
        return torch.stack(terms).sum()

    def _names(self, has_teacher: bool) -> tuple[str, ...]:
        """Names of the sums, in the order in which they are computed."""
        if not has_teacher:
            return _OF_STUDENT
        return _OF_BOTH if torch.is_grad_enabled() else (*_OF_BOTH, *_AT_T1)

    def _plain(
        self,
        student_hidden: Tensor,
        student_head: Head,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """From whole logits: the definition, which the chunked form is tested against."""
        logits = student_head.logits(student_hidden)
        if teacher_hidden is None or teacher_head is None:
            ce = self.ce(logits, labels)
            return self.weigh(ce, None), {"ce_loss": ce.detach().float()}
        names = self._names(True)
        with torch.no_grad():
            teacher = teacher_head.logits(teacher_hidden)[:, : self.vocab_size]
        shared = logits[:, : self.vocab_size]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_ratio < 1.0):
            ce = self.ce(logits, labels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_ratio > 0.0):
            kd = self.kd(shared, teacher, labels)
        with torch.no_grad():
            measured = [ce, kd, *self._measure(shared, teacher, labels, len(names))]
            sums = {name: part.detach().float() for name, part in zip(names, measured, strict=True)}
        return self.weigh(ce, kd), sums

    def _measure(
        self, student: Tensor, teacher: Tensor, labels: Tensor, count: int
    ) -> list[Tensor]:
        """The sums after CE and KD, `count` with these, from logits `[tokens, vocab]`."""
        valid = labels != IGNORE_INDEX
        dtype = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student[valid].to(dtype), teacher[valid].to(dtype)
        agree = student.argmax(-1).eq(teacher.argmax(-1)).sum()
        found = [agree, _entropy(teacher / self.temperature)]
        if count > len(_OF_BOTH):
            log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
            kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            found += [kl, _entropy(teacher), _entropy(student)]
        return found

    def chunk_size(self, device: torch.device) -> int:
        """Tokens in one chunk."""
        return self._chunk_size or chunk_of(device.type)

    def buffers(self, chunk: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Room for a chunk. A GPU's allocator keeps freed memory; on a CPU every page of new memory
        is cleared by the system first, which costs more than a softmax: there it is kept here."""
        if device.type != "cpu":
            return Buffers(chunk, dtype, device)
        kept = self._kept
        if kept is None or kept.chunk < chunk or kept.dtype != dtype:
            kept = self._kept = Buffers(chunk, dtype, device)
        return kept


class _Chunked(torch.autograd.Function):
    """The loss and, at once, its gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        loss: DistillationLoss,
        takes_gradients: bool,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        shared, alpha, t = loss.vocab_size or vocab, loss.kd_ratio, loss.temperature
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(1, min(loss.chunk_size(hidden.device), tokens))
        buffers = loss.buffers(chunk, dtype, hidden.device)
        wanted = [takes_gradients and needed for needed in ctx.needs_input_grad[:3]]
        grads = _Gradients(head, hidden, dtype, wanted)
        valid = labels != IGNORE_INDEX
        targets = torch.where(valid, labels, 0)[:, None]
        valid = valid.to(dtype)
        sums = torch.zeros(count, dtype=dtype, device=hidden.device)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            student = _logits("student", head, hidden[rows], vocab, buffers)
            if teacher_hidden is None or teacher_head is None:
                parts, gradient = cross_entropy(student, targets[rows], buffers)
            else:
                teacher = _logits("teacher", teacher_head, teacher_hidden[rows], shared, buffers)
                measures = count > len(_OF_BOTH)
                parts, gradient = compare_chunk(
                    student, teacher, targets[rows], alpha, t, buffers, measures
                )
            sums += parts @ valid[rows]
            if any(wanted):
                grads.add(rows, gradient, student, valid[rows], buffers)
        total = loss.weigh(sums[0], None if teacher_hidden is None else sums[1])
        sums = sums.float()
        if tokens == 0:  # no chunk has written
            grads.clear()
        ctx.gradients = grads.found
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            raise RuntimeError("the chunked loss can be differentiated once only")
        return *(None if g is None else g.mul_(grad) for g in found), *[None] * 7


def _logits(name: str, head: Head, hidden: Tensor, vocab: int, buffers: Buffers) -> Tensor:
    """Compute the first `vocab` of `Head.logits` in the buffer of that name. The product is rounded
    to the model's dtype, as the model itself would round it."""
    rows = len(hidden)
    is_same = hidden.dtype == buffers.dtype
    product = buffers.get(name if is_same else "product", rows, vocab, hidden.dtype)
    weight = head.weight[:vocab].t()
    if head.bias is None:
        torch.mm(hidden, weight, out=product)
    else:
        torch.addmm(head.bias[:vocab], hidden, weight, out=product)
    out = product if is_same else buffers.get(name, rows, vocab).copy_(product)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _entropy(logits: Tensor) -> Tensor:
    """Of the softmax of each row of `[rows, vocab]`, nats, summed."""
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum()


class _Gradients:
    """d loss / d (hidden, weight, bias), grown chunk by chunk; None where not wanted."""

    def __init__(self, head: Head, hidden: Tensor, dtype: torch.dtype, wanted: list[bool]):
        self.head, self.hidden = head, hidden
        bias = head.bias
        self.found = (
            torch.empty_like(hidden) if wanted[0] else None,
            torch.empty_like(head.weight, dtype=dtype) if wanted[1] else None,
            torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None,
        )

    def clear(self) -> None:
        for found in self.found:
            if found is not None:
                found.zero_()

    def add(
        self, rows: slice, gradient: Tensor, logits: Tensor, valid: Tensor, buffers: Buffers
    ) -> None:
        """The share of one chunk: `gradient` with respect to `logits`; both are used up."""
        head, hidden = self.head, self.hidden[rows]
        to_hidden, to_weight, to_bias = self.found
        if head.softcap is not None:  # tanh' = 1 - tanh²
            gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
        # Validity and the head's scale are worth a pass over [rows, hidden], not [rows, vocab].
        factor = valid * head.scale
        if hidden.dtype != gradient.dtype:
            gradient = buffers.like("product", gradient, hidden.dtype).copy_(gradient)
        if to_hidden is not None:
            torch.mm(gradient, head.weight, out=to_hidden[rows])
            to_hidden[rows].mul_(factor[:, None])
        scaled = (hidden * factor[:, None]).to(hidden.dtype)
        if to_weight is not None:
            is_first = rows.start == 0
            if to_weight.dtype == gradient.dtype:
                to_weight.addmm_(gradient.t(), scaled, beta=0.0 if is_first else 1.0)  # 0: not read
            elif is_first:
                to_weight.copy_(gradient.t() @ scaled)
            else:
                to_weight.add_(gradient.t() @ scaled)
        if to_bias is not None:
            to_bias.add_(gradient.t() @ factor.to(gradient.dtype))
