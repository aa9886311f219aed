"""Compute (1 - α)·CE + α·T²·D from hidden states, a chunk of tokens at a time, in pure torch.

`[tokens, vocab]` logits are the largest tensors of a distillation step: at 4,096 tokens and 128k
words one fp32 copy takes 2 GB, and the plain computation keeps about six. Here both heads are
applied to a few hundred tokens at a time, and the gradients with respect to the student's hidden
states and head are taken at once, while the chunk's logits are there. Nothing of vocabulary size
but the head's own gradient outlives a chunk, no logit is computed twice, and the buffers of one
chunk serve the next.

With q = softmax(z_s), y the label and g the divergence's gradient with respect to z_s/T:

    d/dz_s [ (1 - α)·CE + α·T²·D ] = (1 - α)·(q - onehot(y)) + α·T·g

q runs over the student's whole head, as transformers computes its loss; D compares the ids that
both models share, where their heads are padded to different sizes.

The idea of taking a loss's gradient in its forward is Liger Kernel's (Hsu et al. 2024,
arXiv:2410.10989); here it covers both losses and both heads under ZeRO-3's hooks.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import name_own_code
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.fused.chunk import can_fuse, distil
from ds_kd.losses.head import Gradients, States
from ds_kd.losses.own import OwnCrossEntropy, OwnDivergence, adapt
from ds_kd.losses.pair import Pair, find_largest
from ds_kd.losses.scores import describe, describe_health, measure_in_blocks, split_by_position

# Tokens in a chunk if `chunk_size` is not set. Smaller chunks make the matrix products narrow and
# add to the head's gradient more often; larger ones only take memory (docs/performance.md). A GPU
# needs larger products than a CPU to be busy.
_CHUNK, _CHUNK_ON_GPU = 512, 2048


def default_chunk(device: str) -> int:
    """Return the tokens of a chunk on a type of device if the config sets none."""
    return _CHUNK if device == "cpu" else _CHUNK_ON_GPU


class DistillationLoss:
    """The weighted loss (1 - α)·CE + α·T²·D. Only supervised positions are multiplied by a head.

    Args:
        ce: `MaskedCrossEntropy`, or a user's own loss of whole logits.
        divergence: a `Divergence`, or a user's own loss of whole logits; its `temperature` is T and
            its `chunk_size` says how many tokens' logits exist at one time.
        kd_ratio: α in [0, 1]. At 0 a teacher is only measured against; at 1 only the mask of the
            labels is used, not their values.
        vocab_size: number of ids both models share, where their padded heads differ: D is over
            these, CE over the student's whole head. None takes the heads as they are.

    Raises:
        ValueError: `kd_ratio` out of range.
    """

    def __init__(self, ce: Any, divergence: Any, kd_ratio: float, vocab_size: int | None = None):
        if not 0.0 <= kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}")
        self.ce, self.divergence = adapt(ce, OwnCrossEntropy), adapt(divergence, OwnDivergence)
        self.kd_ratio, self.vocab_size = float(kd_ratio), vocab_size
        self._kept: Buffers | None = None

    def __call__(
        self,
        student: States,
        labels: Tensor,
        teacher: Any | None = None,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and the sums of its parts.

        Args:
            student: hidden states with a graph, `[tokens, hidden]`, and the student's head.
            labels: `[tokens]` int64, shifted.
            teacher: a teacher's output for the same tokens (`ds_kd.teachers.base`); may be None at
                `kd_ratio` 0.
            counts: `[tokens]`, how often each token counts; once by default. Not for a user's own
                loss of whole logits, which returns a chunk's sum.
            positions: `[tokens]`, the place of each in its sample, by which validation splits its
                KL; may be None in training.

        Returns:
            The differentiable scalar (nats, summed over valid tokens), whose backward can be run
            once, and detached sums over valid tokens by name. The names depend only on whether
            there is a teacher and whether gradients are enabled, so all ranks have the same ones.
        """
        sums: dict[str, Tensor] = {}
        head = student.head
        # Read here: inside a Function grad mode is off, and needs_input_grad ignores no_grad.
        is_training = torch.is_grad_enabled()
        with name_own_code("a loss fails"):
            total = _Chunked.apply(  # type: ignore[no-untyped-call]
                student.hidden,
                head.weight,
                head.bias,
                student,
                labels,
                counts,
                None if is_training else positions,
                teacher,
                self,
                is_training,
                sums,
            )
        return total, sums

    def weigh(self, sums: dict[str, Tensor]) -> Tensor:
        """Return the optimised sum: (1 - α)·CE + α·KD, or CE alone without a teacher."""
        alpha = self.kd_ratio if "kd_loss" in sums else 0.0
        # 0·inf is NaN: a part that is not optimised must not spoil the one that is.
        weights = {"ce_loss": 1.0 - alpha, "kd_loss": alpha}
        return torch.stack([w * sums[name] for name, w in weights.items() if w > 0]).sum()

    def of_chunk(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        buffers: Buffers,
        is_training: bool,
        is_whole: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute both losses of one chunk, and the metrics that are logged beside them.

        Args:
            student: logits `[tokens, student vocab]`, unchanged on return; if the buffers keep
                products, the gradient is written over them.
            teacher: logits `[tokens, shared vocab]`, overwritten; None without a teacher.
            labels: `[tokens]`.
            is_training: if not, all that validation logs is measured too.
            is_whole: whether the teacher's logits are those of all ids, so that it can be said what
                they would be at another temperature.

        Returns:
            Values per token by name, each `[tokens, 1]`, and d loss / d student logits
            `[tokens, student vocab]`.
        """
        if buffers.keeps_products and teacher is not None:
            found, gradient = distil(self.divergence, student, teacher, labels, self.kd_ratio)
            kept = {n: v for n, v in found.items() if is_whole or not n.endswith("_at_t1")}
            return kept, gradient
        if teacher is None:
            largest = student.amax(-1, keepdim=True)
            ce, gradient = self.ce.of_chunk(student, largest, labels, buffers)
            return {"ce_loss": ce}, self._take_off_one_hot(gradient, labels, 1.0)

        # The divergence compares the ids that both models share; CE keeps the student's whole head.
        shared = student
        if student.shape[1] != teacher.shape[1]:
            shared = buffers.like("shared", teacher).copy_(student[:, : teacher.shape[1]])
        best, teacher_best = find_largest(shared), find_largest(teacher)
        measured = {"top1_agreement": (best == teacher_best).to(student.dtype)}
        largest, teacher_largest = shared.gather(1, best), teacher.gather(1, teacher_best)
        logits = (shared, teacher, largest, teacher_largest)

        # At T = 1 a divergence has the softmaxes that these need.
        with_t1 = is_whole and is_training and self.divergence.temperature == 1.0
        if is_whole and not with_t1:
            measure = describe if is_training else describe_health
            measured |= measure_in_blocks(Pair(*logits, 1.0, labels, buffers), measure)
        values, gradient = self._compute_losses(student, logits, labels, buffers, with_t1)
        return values | measured, gradient

    def _compute_losses(
        self,
        student: Tensor,
        logits: tuple[Tensor, Tensor, Tensor, Tensor],
        labels: Tensor,
        buffers: Buffers,
        with_t1: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute CE and the divergence of one chunk.

        Args:
            student: the student's whole logits `[tokens, student vocab]`.
            logits: over the shared ids, the first four arguments of `Pair`, not yet divided by T;
                the first may be `student` itself.
            with_t1: T is 1 and what `describe` finds is wanted too.
        """
        t, alpha, divergence = self.divergence.temperature, self.kd_ratio, self.divergence
        is_padded = logits[0] is not student
        shares_softmax = t == 1.0 and not is_padded and self.ce.leaves_one_hot_out
        join = getattr(divergence, "of_chunk_with_softmax", None) if shares_softmax else None
        label_logit = student.gather(1, labels.clamp(min=0)[:, None])

        # CE reads the student's logits before they are divided by T in place. At T = 1 it needs the
        # softmax that the divergence computes, and is taken from that below.
        if join is None:
            largest = student.amax(-1, keepdim=True) if is_padded else logits[2]
            ce, ce_gradient = self.ce.of_chunk(student, largest, labels, buffers)

        if t != 1.0:
            for part in logits:
                part.div_(t)
        pair = Pair(*logits, t, labels, buffers, divergence.reads_teacher_logits)
        measured = describe(pair) if with_t1 and divergence.takes_whole_chunks else {}
        if join is not None:
            entropy = pair.teacher_entropy
            kd, gradient = join(pair, alpha)
            ce = pair.student_lse - label_logit
        else:
            if divergence.takes_whole_chunks:
                entropy = pair.teacher_entropy
                kd, kd_gradient = divergence.of_chunk(pair)
            else:
                kd, kd_gradient, entropy, measured = _evaluate_blocks(divergence, pair, with_t1)
            gradient = _join(ce_gradient, 1.0 - alpha, kd_gradient, alpha * t)
            if t != 1.0 and not is_padded:
                student.mul_(t)
        values = {"ce_loss": ce, "kd_loss": kd * t**2, "teacher_entropy": entropy}
        return values | measured, self._take_off_one_hot(gradient, labels, 1.0 - alpha)

    def _take_off_one_hot(self, gradient: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Subtract the labels' one-hot from a gradient `[tokens, student vocab]`, unless CE did."""
        if self.ce.leaves_one_hot_out:
            at = labels.clamp(min=0)[:, None]
            gradient.scatter_add_(1, at, gradient.new_full(at.shape, -weight))
        return gradient

    def chunk_size(self, device: torch.device, tokens: int) -> int:
        """Return the tokens of one chunk."""
        wanted = self.divergence.chunk_size
        wanted = default_chunk(device.type) if wanted is None else wanted
        return max(1, min(wanted or tokens, tokens))

    def is_fused(self, student: States, is_training: bool) -> bool:
        """Return whether one kernel computes both losses of a chunk. Another CE, and what changes
        the logits once more, are left to the plain code."""
        is_wanted = type(self.ce) is MaskedCrossEntropy and is_training and self.kd_ratio > 0
        is_plain, hidden = student.head.softcap is None, student.hidden
        return is_wanted and is_plain and can_fuse(self.divergence, hidden.device, hidden.dtype)

    def buffers(
        self, chunk: int, dtype: torch.dtype, device: torch.device, keeps_products: bool
    ) -> Buffers:
        """Return the buffers for a chunk.

        On a CPU they are kept for the next call: the system clears every page of new memory, which
        costs more than a softmax. A GPU's allocator keeps freed memory itself.
        """
        if device.type != "cpu" or keeps_products:
            return Buffers(chunk, dtype, device, keeps_products)
        kept = self._kept
        if kept is None or kept.chunk < chunk or kept.dtype != dtype:
            kept = self._kept = Buffers(chunk, dtype, device)
        return kept


class _Chunked(torch.autograd.Function):
    """Compute the loss and its gradients in forward; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student: States,
        labels: Tensor,
        counts: Tensor | None,
        positions: Tensor | None,
        teacher: Any | None,
        loss: DistillationLoss,
        is_training: bool,
        sums: dict[str, Tensor],
    ) -> Tensor:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunk = loss.chunk_size(hidden.device, tokens)
        fuses = teacher is not None and loss.is_fused(student, is_training)
        buffers = loss.buffers(chunk, dtype, hidden.device, fuses)
        wanted = [is_training and needed for needed in ctx.needs_input_grad[:3]]
        # Inside a Function these tensors have no graph, so that the products are not recorded.
        grads = Gradients(States(hidden, student.head), dtype, wanted)
        valid = (labels != IGNORE_INDEX).to(dtype)
        if counts is not None:
            valid = valid * counts

        totals = torch.zeros((), dtype=dtype, device=hidden.device)
        with contextlib.ExitStack() as stack:
            source = None if teacher is None else stack.enter_context(teacher.open())
            is_whole = getattr(source, "is_whole", True)
            for start in range(0, max(1, tokens), chunk):  # no token makes one empty chunk
                rows = slice(start, start + chunk)
                z_s = grads.states.logits(rows, vocab, "student", buffers)
                z_t = None
                if source is not None:
                    z_t = source.logits(rows, loss.vocab_size or vocab, "teacher", buffers)
                values, gradient = loss.of_chunk(
                    z_s, z_t, labels[rows], buffers, is_training, is_whole
                )
                if positions is not None and "kl_at_t1" in values:
                    values |= split_by_position(values["kl_at_t1"], positions[rows])
                totals = totals + torch.cat([*values.values()], dim=1).t() @ valid[rows]
                if any(wanted):
                    grads.add(rows, gradient, z_s, valid[rows], buffers)
        found = dict(zip(values, totals.unbind(), strict=True))
        sums.update({name: part.float() for name, part in found.items()})
        ctx.gradients = grads.found
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss.weigh(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            raise RuntimeError("the chunked loss can be differentiated once only")
        dtypes = ctx.dtypes
        scaled = [_times(g, grad, dtype) for g, dtype in zip(found, dtypes, strict=True)]
        return *scaled, *[None] * 8


def _times(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a gradient times a scalar, in the dtype of what it belongs to: rounded while it is
    multiplied, without another pass."""
    if gradient is None or gradient.dtype == dtype:
        return None if gradient is None else gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _evaluate_blocks(
    divergence: Any, pair: Pair, with_t1: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return values, gradient and the teacher's entropy of a chunk, and `with_t1` what `describe`
    finds, a few tokens at a time: `[tokens, 1]`, but the gradient `[tokens, shared vocab]`."""
    teacher, found = pair.teacher, dict[str, list[Tensor]]()
    for rows, block in pair.blocks():
        # Before the divergence, which may write over the softmaxes.
        values = {"entropy": block.teacher_entropy, **(describe(block) if with_t1 else {})}
        values["value"], gradient = divergence.of_chunk(block)
        for name, part in values.items():
            found.setdefault(name, []).append(part.to(teacher.dtype))
        teacher[rows] = gradient  # the block has its own logits no longer
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    return whole.pop("value"), teacher, whole.pop("entropy"), whole


def _join(ce: Tensor, ce_weight: float, kd: Tensor, kd_weight: float) -> Tensor:
    """Return the weighted sum of two gradients, `[tokens, student vocab]` and
    `[tokens, shared vocab]`, written over one of them."""
    # A part of weight 0 is left out: 0·inf is NaN.
    if ce.shape == kd.shape:
        _scale(kd, kd_weight)
        return kd.add_(ce, alpha=ce_weight) if ce_weight else kd
    _scale(ce, ce_weight)
    if kd_weight:
        ce[:, : kd.shape[1]].add_(kd, alpha=kd_weight)
    return ce


def _scale(gradient: Tensor, weight: float) -> None:
    """Multiply in place; a weight of 0 leaves nothing of what is not finite."""
    if weight:
        gradient.mul_(weight)
    else:
        gradient.zero_()
