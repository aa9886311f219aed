"""One chunk of tokens: both losses, what is measured beside them, and the gradient with respect to
the student's logits. `ds_kd.losses.chunked` has the formula and goes through the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kd.losses.divergences import is_high, near_kl

_BLOCK = 64  # logits in which a CPU looks for the largest at one time


class Buffers:
    """Room for one chunk's logits by name, made when first asked for and used again."""

    def __init__(self, chunk: int, dtype: torch.dtype, device: torch.device):
        self.chunk, self.dtype, self.device = chunk, dtype, device
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, vocab: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[rows, vocab]`, uninitialised."""
        key = (name, vocab, dtype or self.dtype)
        if key not in self._made:
            self._made[key] = torch.empty((self.chunk, vocab), dtype=key[2], device=self.device)
        return self._made[key][:rows]

    def like(self, name: str, logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`get`, of the shape of `logits`."""
        rows, vocab = logits.shape
        return self.get(name, rows, vocab, dtype)


def cross_entropy(student: Tensor, targets: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """As `compare_chunk`, without a teacher."""
    q, lse = _softmax(student, student.amax(-1, keepdim=True), buffers.like("q", student))
    ce = lse - student.gather(1, targets)
    return ce.t(), q.scatter_add_(1, targets, torch.full_like(ce, -1.0))


def compare_chunk(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    alpha: float,
    t: float,
    buffers: Buffers,
    measures: bool,
) -> tuple[Tensor, Tensor]:
    """Compute both losses of one chunk, what is measured beside them, and the gradient.

    Args:
        student: logits `[rows, student vocab]`.
        teacher: logits `[rows, shared vocab]`; its buffer is used up.
        targets: `[rows, 1]`.
        alpha, t: kd_ratio and temperature.
        measures: whether the sums at T = 1 are wanted too.

    Returns:
        The sums per token `[sums, rows]`, and d loss / d student logits `[rows, student vocab]`.
        `student` comes back as it was.
    """
    label_logit = student.gather(1, targets)
    is_padded = student.shape[1] != teacher.shape[1]
    shared = student
    if is_padded:
        shared = buffers.like("shared", teacher).copy_(student[:, : teacher.shape[1]])
    best, teacher_best = _argmax(shared), _argmax(teacher)
    agree = best == teacher_best
    largest, teacher_largest = shared.gather(1, best), teacher.gather(1, teacher_best)
    at_t1 = _measure(shared, teacher, largest, teacher_largest, buffers) if measures else []
    # CE's softmax is KD's where both are at T = 1 and over the same ids.
    is_same = t == 1.0 and not is_padded
    if not is_same:
        whole = student.amax(-1, keepdim=True) if is_padded else largest
        q_1, lse_1 = _softmax(student, whole, buffers.like("q at T = 1", student))
    if t != 1.0:
        for scaled in (shared, largest, teacher, teacher_largest):
            scaled.div_(t)
    p = buffers.like("p", teacher)
    kl, entropy, q, lse = _compare(shared, teacher, largest, teacher_largest, p, teacher, t)
    if is_same:
        lse_1, gradient = lse, q.sub_(p, alpha=alpha)
    else:
        if not is_padded:
            student.mul_(t)
        gradient = _join(q_1, q.sub_(p), alpha, t)
    ce = lse_1 - label_logit
    gradient.scatter_add_(1, targets, torch.full_like(ce, alpha - 1.0))
    parts = [ce, kl * t**2, agree.to(ce.dtype), entropy, *at_t1]
    return torch.cat(parts, dim=1).t(), gradient


def _join(q: Tensor, difference: Tensor, alpha: float, t: float) -> Tensor:
    """(1 - α)·q + α·T·(q_T - p) `[rows, student vocab]`, in the buffer of one of them."""
    if q.shape == difference.shape:
        return difference.mul_(alpha * t).add_(q, alpha=1.0 - alpha)
    q.mul_(1.0 - alpha)[:, : difference.shape[1]].add_(difference, alpha=alpha * t)
    return q


def _compare(
    student: Tensor,
    teacher: Tensor,
    largest: Tensor,
    teacher_largest: Tensor,
    p: Tensor,
    scratch: Tensor,
    t: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(teacher ‖ student) and what it is made of.

    Args:
        student, teacher: logits over temperature `[rows, vocab]`.
        largest, teacher_largest: of each row, `[rows, 1]`.
        p: receives the teacher's probabilities.
        scratch: receives the student's; may be the teacher's own buffer.
        t: the temperature, as the KL is small where it is high.

    Returns:
        KL and the teacher's entropy `[rows, 1]`, the student's probabilities `[rows, vocab]` and
        log-sum-exp `[rows, 1]`.
    """
    _, lse_t = _softmax(teacher, teacher_largest, p)
    difference = student - teacher if is_high(t) else None
    # KL = Σ p·(z_t - z_s) - lse_t + lse_s: two dot products instead of passes over log q and log p.
    p_teacher = torch.mul(p, teacher, out=scratch).sum(-1, keepdim=True)
    p_student = torch.mul(p, student, out=scratch).sum(-1, keepdim=True)
    q, lse_s = _softmax(student, largest, scratch)
    kl = p_teacher - p_student - lse_t + lse_s
    if difference is not None:
        kl = near_kl(difference, p, kl)
    return kl, lse_t - p_teacher, q, lse_s


def _measure(
    student: Tensor, teacher: Tensor, largest: Tensor, teacher_largest: Tensor, buffers: Buffers
) -> list[Tensor]:
    """KL, teacher's and student's entropy at T = 1, each `[rows, 1]`; the logits stay."""
    p, scratch = buffers.like("p", teacher), buffers.like("scratch", teacher)
    kl, entropy, q, lse = _compare(student, teacher, largest, teacher_largest, p, scratch, 1.0)
    return [kl, entropy, lse - q.mul_(student).sum(-1, keepdim=True)]


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
