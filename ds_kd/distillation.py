"""(1 - α)·CE + α·KD from hidden states, a chunk of tokens at a time: pure torch.

`[tokens, vocab]` logits are the largest tensors of a distillation step: at 4,096 tokens and 128k
words one fp32 copy takes 2 GB, and the plain computation keeps about six. Here both heads are
applied to a few hundred tokens at a time, and the gradients with respect to the student's hidden
states and head are taken at once, while the chunk's logits are there. Nothing of vocabulary size
but the head's own gradient outlives a chunk, no logit is computed twice, and the buffers of one
chunk serve the next.

With q = softmax(z_s), q_T = softmax(z_s/T), p = softmax(z_t/T) and y the label:

    d/dz_s [ (1 - α)·CE + α·T²·KL ] = (1 - α)·(q - onehot(y)) + α·T·(q_T - p)

The idea of taking a loss's gradient in its forward is Liger Kernel's (Hsu et al. 2024,
arXiv:2410.10989); here it covers both losses and both heads under ZeRO-3's hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kd.losses import SUMS, KDLoss, MaskedCrossEntropy

# Tokens in a chunk where `chunk_size` does not say. Fewer make the matrix products narrow and add
# to the head's gradient more often; more only take room (docs/performance.md). A GPU needs more to
# be busy.
_CHUNK, _CHUNK_ON_GPU = 512, 2048
_BLOCK = 64  # logits in which a CPU looks for the largest at one time


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


def chunk_of(device: str) -> int:
    """Tokens of a chunk where the config does not say; on a kind of device."""
    return _CHUNK if device == "cpu" else _CHUNK_ON_GPU


class DistillationLoss:
    """(1 - α)·CE + α·KD from hidden states, so that only supervised rows ever meet a head.

    Args:
        ce: cross-entropy of the student, a sum over valid tokens.
        kd: distillation loss, a sum over valid tokens; it multiplies by T² itself, and its
            `chunk_size` says how many tokens' logits exist at one time.
        kd_ratio: α in [0, 1]. At 0 the teacher is not used at all, at 1 the labels' values are not
            (their mask is).
        vocab_size: number of ids both models share, where their padded heads differ; None takes the
            heads as they are.

    A chunk is computed in fp32 whatever the losses' `fp32_upcast` says. Other losses than
    `MaskedCrossEntropy` and `KDLoss` get whole logits.

    Raises:
        ValueError: `kd_ratio` out of range, or two ignore_index that differ.
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
        if ce.ignore_index != kd.ignore_index:
            raise ValueError(
                f"ignore_index is {ce.ignore_index} for loss_fn and {kd.ignore_index} for "
                "kd_loss_fn; write the same"
            )
        self.ce, self.kd, self.kd_ratio, self.vocab_size = ce, kd, float(kd_ratio), vocab_size
        known = type(ce) is MaskedCrossEntropy and type(kd) is KDLoss
        self._is_chunked = known and kd.chunk_size != 0
        self._kept: _Buffers | None = None

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
            The differentiable scalar (nats, summed over valid tokens) and a detached `[4]` tensor
            of `SUMS`. Its backward can be run once.
        """
        if not self._is_chunked:
            return self._plain(student_hidden, student_head, labels, teacher_hidden, teacher_head)
        return _Chunked.apply(  # type: ignore[no-any-return]
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
        )

    def _plain(
        self,
        student_hidden: Tensor,
        student_head: Head,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
    ) -> tuple[Tensor, Tensor]:
        """From whole logits: the definition, which the chunked form is tested against."""
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
        with torch.no_grad():
            valid = labels != self.ce.ignore_index
            log_p = self.kd.log_probs(teacher_logits[valid])
            entropy = -(log_p.exp() * log_p).sum()
            agree = student_logits.argmax(-1).eq(teacher_logits.argmax(-1))[valid].sum()
            sums = torch.stack([ce.float(), kd.float(), agree.float(), entropy.float()])
        return loss, sums

    def chunk_size(self, device: torch.device) -> int:
        """Tokens in one chunk."""
        return self.kd.chunk_size or chunk_of(device.type)

    def buffers(self, chunk: int, vocab: int, dtype: torch.dtype, device: torch.device) -> _Buffers:
        """Room for a chunk. A GPU's allocator keeps freed memory; on a CPU every page of new memory
        is cleared by the system first, which costs more than a softmax: there it is kept here."""
        if device.type != "cpu":
            return _Buffers(chunk, vocab, dtype, device)
        kept = self._kept
        if kept is None or kept.chunk < chunk or (kept.vocab, kept.dtype) != (vocab, dtype):
            kept = self._kept = _Buffers(chunk, vocab, dtype, device)
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
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0]
        vocab = loss.vocab_size or weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(1, min(loss.chunk_size(hidden.device), tokens))
        buffers = loss.buffers(chunk, vocab, dtype, hidden.device)
        wanted = [takes_gradients and needed for needed in ctx.needs_input_grad[:3]]
        grads = _Gradients(head, hidden, vocab, dtype, wanted)
        valid = labels != loss.ce.ignore_index
        targets = torch.where(valid, labels, 0)[:, None]
        valid = valid.to(dtype)
        sums = torch.zeros(len(SUMS), dtype=dtype, device=hidden.device)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            student = buffers.logits("student", head, hidden[rows])
            if teacher_hidden is None or teacher_head is None:
                parts, gradient = _cross_entropy(student, targets[rows], buffers)
            else:
                teacher = buffers.logits("teacher", teacher_head, teacher_hidden[rows])
                parts, gradient = _both(student, teacher, targets[rows], loss, buffers)
            sums += parts @ valid[rows]
            if any(wanted):
                grads.add(rows, gradient, student, valid[rows], buffers)
        alpha = loss.kd_ratio if teacher_hidden is not None else 0.0
        # 0·inf is NaN: a part that is not optimised must not spoil the one that is.
        terms = [w * s for w, s in ((1 - alpha, sums[0]), (alpha, sums[1])) if w > 0]
        total = torch.stack(terms).sum()
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
        return *(None if g is None else g.mul_(grad) for g in found), *[None] * 6


class _Buffers:
    """Room for one chunk's logits by name, made when first asked for and used again."""

    def __init__(self, chunk: int, vocab: int, dtype: torch.dtype, device: torch.device):
        self.chunk, self.vocab, self.dtype, self.device = chunk, vocab, dtype, device
        self._made: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[rows, vocab]`, uninitialised."""
        key = (name, dtype or self.dtype)
        if key not in self._made:
            self._made[key] = torch.empty(
                (self.chunk, self.vocab), dtype=key[1], device=self.device
            )
        return self._made[key][:rows]

    def logits(self, name: str, head: Head, hidden: Tensor) -> Tensor:
        """`Head.logits` in the buffer of that name. The product is rounded to the model's dtype, as
        the model itself would round it."""
        product = self.get(
            name if hidden.dtype == self.dtype else "product", len(hidden), hidden.dtype
        )
        weight = head.weight[: self.vocab].t()
        if head.bias is None:
            torch.mm(hidden, weight, out=product)
        else:
            torch.addmm(head.bias[: self.vocab], hidden, weight, out=product)
        out = product if hidden.dtype == self.dtype else self.get(name, len(hidden)).copy_(product)
        if head.scale != 1.0:
            out.mul_(head.scale)
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out


def _cross_entropy(student: Tensor, targets: Tensor, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """As `_both`, without a teacher."""
    q, lse = _softmax(student, student.amax(-1, keepdim=True), buffers.get("q", len(student)))
    ce = lse - student.gather(1, targets)
    zero = torch.zeros_like(ce)
    parts = torch.cat([ce, zero, zero, zero], dim=1).t()
    return parts, q.scatter_add_(1, targets, torch.full_like(ce, -1.0))


def _both(
    student: Tensor, teacher: Tensor, targets: Tensor, loss: DistillationLoss, buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """One chunk.

    Args:
        student, teacher: logits `[rows, vocab]`; the teacher's buffer is used up.
        targets: `[rows, 1]`.

    Returns:
        `SUMS` per token `[4, rows]`, and d loss / d student logits `[rows, vocab]`. `student` comes
        back as it was.
    """
    alpha, t, rows = loss.kd_ratio, loss.kd.temperature, len(student)
    label_logit = student.gather(1, targets)
    best, teacher_best = _argmax(student), _argmax(teacher)
    agree = best == teacher_best
    student_max, teacher_max = student.gather(1, best), teacher.gather(1, teacher_best)
    if t != 1.0:
        q_1, lse_1 = _softmax(student, student_max, buffers.get("q at T = 1", rows))
        for scaled in (student, student_max, teacher, teacher_max):
            scaled.div_(t)
    p, lse_t = _softmax(teacher, teacher_max, buffers.get("p", rows))
    # KL = Σ p·(z_t - z_s) - lse_t + lse_s: two dot products instead of passes over log q and log p.
    p_teacher = torch.mul(p, teacher, out=teacher).sum(-1, keepdim=True)
    p_student = torch.mul(p, student, out=teacher).sum(-1, keepdim=True)
    q, lse_s = _softmax(student, student_max, teacher)
    kd = (p_teacher - p_student - lse_t + lse_s) * t**2
    entropy = lse_t - p_teacher
    if t == 1.0:
        lse, gradient = lse_s, q.sub_(p, alpha=alpha)
    else:
        student.mul_(t)
        lse, gradient = lse_1, q.sub_(p).mul_(alpha * t).add_(q_1, alpha=1.0 - alpha)
    ce = lse - label_logit
    gradient.scatter_add_(1, targets, torch.full_like(ce, alpha - 1.0))
    return torch.cat([ce, kd, agree.to(ce.dtype), entropy], dim=1).t(), gradient


def _argmax(logits: Tensor) -> Tensor:
    """Of each row, `[rows, 1]`. torch's own takes five times as long on a CPU as its `amax`: find
    the block that holds the largest first."""
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % _BLOCK:
        return logits.argmax(-1, keepdim=True)
    blocks = logits.view(rows, vocab // _BLOCK, _BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + inside.argmax(-1, keepdim=True)


def _softmax(logits: Tensor, largest: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension into `out`, and log-sum-exp `[rows, 1]`.

    Args:
        logits: `[rows, vocab]`.
        largest: of each row, `[rows, 1]`. Its probability e^(max - lse) is at least 1/vocab, so
            that the logarithm is safe.
    """
    torch.softmax(logits, -1, out=out)
    return out, largest - out.amax(-1, keepdim=True).log()


class _Gradients:
    """d loss / d (hidden, weight, bias), grown chunk by chunk; None where not wanted."""

    def __init__(
        self, head: Head, hidden: Tensor, vocab: int, dtype: torch.dtype, wanted: list[bool]
    ):
        self.head, self.hidden, self.vocab = head, hidden, vocab
        bias = head.bias
        self.found = (
            torch.empty_like(hidden) if wanted[0] else None,
            _room(head.weight, vocab, dtype) if wanted[1] else None,
            torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None,
        )

    def clear(self) -> None:
        for found in self.found:
            if found is not None:
                found.zero_()

    def add(
        self, rows: slice, gradient: Tensor, logits: Tensor, valid: Tensor, buffers: _Buffers
    ) -> None:
        """The share of one chunk: `gradient` with respect to `logits`; both are used up."""
        head, hidden = self.head, self.hidden[rows]
        to_hidden, to_weight, to_bias = self.found
        if head.softcap is not None:  # tanh' = 1 - tanh²
            gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
        # Validity and the head's scale are worth a pass over [rows, hidden], not [rows, vocab].
        factor = valid * head.scale
        if hidden.dtype != gradient.dtype:
            gradient = buffers.get("product", len(hidden), hidden.dtype).copy_(gradient)
        if to_hidden is not None:
            torch.mm(gradient, head.weight[: self.vocab], out=to_hidden[rows])
            to_hidden[rows].mul_(factor[:, None])
        scaled = (hidden * factor[:, None]).to(hidden.dtype)
        if to_weight is not None:
            into = to_weight[: self.vocab]
            is_first = rows.start == 0
            if into.dtype == gradient.dtype:
                into.addmm_(gradient.t(), scaled, beta=0.0 if is_first else 1.0)  # 0: not read
            elif is_first:
                into.copy_(gradient.t() @ scaled)
            else:
                into.add_(gradient.t() @ scaled)
        if to_bias is not None:
            to_bias[: self.vocab].add_(gradient.t() @ factor.to(gradient.dtype))


def _room(weight: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """For the gradient of `weight`: uninitialised where a chunk will write, 0 beyond `vocab`."""
    room = torch.empty_like(weight, dtype=dtype)
    room[vocab:].zero_()
    return room
