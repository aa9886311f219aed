"""The Triton kernel of `forward_kl.py`, which imports this module where Triton is: on a GPU, or in
tests under Triton's interpreter.

A program has one token. It reads the logits of both models for maxima and sums, which are rescaled
whenever a larger maximum is met, and for the gradient; in between for what is logged at T = 1,
unless T is 1. All arithmetic is in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def distil_row(
    student, teacher, labels, found, shared, vocab, student_step, teacher_step,
    inverse_t, ce_weight, kd_weight,
    HAS_CE: tl.constexpr, AT_1: tl.constexpr, IS_HIGH: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute CE and forward KL of one token, and write their gradient over its student logits.

    Args:
        student, teacher: logits, of any floating-point dtype, with so many numbers from one row to
            the next (`student_step`, `teacher_step`).
        labels: `[rows]`, negative for a token that does not count.
        found: `[rows, COLUMNS]`, receives the columns of `forward_kl.COLUMNS`.
        shared, vocab: ids of the teacher's and of the student's logits.
        inverse_t: 1/T.
        ce_weight, kd_weight: factors of the two gradients.
        HAS_CE: CE has a part in the gradient.
        AT_1: T is 1.
        IS_HIGH: T is so high that the sums of `near_kl` are wanted.
        BLOCK: columns read at one time.
    """
    student, teacher, found, label, label_logit = _open_row(
        student, teacher, labels, found, student_step, teacher_step, COLUMNS
    )
    lse_1, lse_s, lse_t, mean_t, gap, agrees, top_s, _, top_t, _ = _sum_up(
        student, teacher, shared, vocab, inverse_t, BLOCK
    )
    kl = gap - lse_t + lse_s
    entropy_t = lse_t - mean_t
    tl.store(found + 0, lse_1 - label_logit)
    tl.store(found + 1, kl)
    tl.store(found + 2, entropy_t)
    tl.store(found + 3, agrees)

    # At T = 1 only the student's entropy is left to find, of what the gradient reads anyway.
    if not AT_1:
        _sum_at_t1(student, teacher, found, shared, top_s, top_t, BLOCK)

    entropy_s, series, farthest = _write_shared(
        student, teacher, shared, inverse_t, lse_1, lse_s, lse_t, gap, label,
        ce_weight, kd_weight, HAS_CE, AT_1, IS_HIGH, BLOCK,
    )  # fmt: skip
    if AT_1:
        _store_at_t1(found, kl, entropy_t, entropy_s)
    _write_rest(student, shared, vocab, lse_1, label, ce_weight, HAS_CE, BLOCK)
    tl.store(found + 7, series)
    tl.store(found + 8, farthest)


@triton.jit
def _open_row(student, teacher, labels, found, student_step, teacher_step, COLUMNS: tl.constexpr):
    """Return where the rows of this program's token begin in `student`, `teacher` and `found`, its
    label, or 0 if it does not count, and the student's logit of the label."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_step
    teacher += row * teacher_step
    found += row * COLUMNS
    label = tl.maximum(tl.load(labels + row), 0)
    label_logit = tl.load(student + label).to(tl.float32)
    # Every thread has read it before one writes a gradient there.
    tl.debug_barrier()
    return student, teacher, found, label, label_logit


@triton.jit
def _sum_up(student, teacher, shared, vocab, inverse_t, BLOCK: tl.constexpr):
    """Return log Σ e^z_s over all ids, log Σ e^(z/T) over the shared ids of student and teacher,
    Σ p·z_t/T, Σ p·(z_t - z_s)/T, 1 if both models name the same token first, else 0, and of the
    shared ids of student and teacher the largest logit and Σ e^((z - largest)/T)."""
    at = tl.arange(0, BLOCK)
    top_s = -float("inf")
    top_t = -float("inf")
    best_s = 0
    best_t = 0
    sum_1 = 0.0
    sum_s = 0.0
    sum_t = 0.0
    mean = 0.0
    gap = 0.0
    for start in range(0, shared, BLOCK):
        inside = start + at < shared
        z_s = tl.load(student + start + at, inside, other=-float("inf")).to(tl.float32)
        z_t = tl.load(teacher + start + at, inside, other=-float("inf")).to(tl.float32)
        here_s, index_s = tl.max(z_s, 0, return_indices=True)
        here_t, index_t = tl.max(z_t, 0, return_indices=True)
        best_s = tl.where(here_s > top_s, start + index_s, best_s)
        best_t = tl.where(here_t > top_t, start + index_t, best_t)

        # All sums are relative to the largest logit so far.
        new_s = tl.maximum(top_s, here_s)
        new_t = tl.maximum(top_t, here_t)
        sum_1 = sum_1 * tl.exp(top_s - new_s) + tl.sum(tl.exp(z_s - new_s), 0)
        scale = tl.exp((top_s - new_s) * inverse_t)
        sum_s = sum_s * scale + tl.sum(tl.exp((z_s - new_s) * inverse_t), 0)
        scale = tl.exp((top_t - new_t) * inverse_t)
        e_t = tl.exp((z_t - new_t) * inverse_t)
        sum_t = sum_t * scale + tl.sum(e_t, 0)
        mean = mean * scale + tl.sum(tl.where(inside, e_t * (z_t * inverse_t), 0.0), 0)
        gap = gap * scale + tl.sum(tl.where(inside, e_t * ((z_t - z_s) * inverse_t), 0.0), 0)
        top_s = new_s
        top_t = new_t

    lse_s = top_s * inverse_t + tl.log(sum_s)
    lse_t = top_t * inverse_t + tl.log(sum_t)
    lse_1 = _sum_rest(student, shared, vocab, top_s, sum_1, BLOCK)
    agrees = tl.where(best_s == best_t, 1.0, 0.0)
    mean, gap = mean / sum_t, gap / sum_t
    return lse_1, lse_s, lse_t, mean, gap, agrees, top_s, sum_s, top_t, sum_t


@triton.jit
def _sum_rest(student, shared, vocab, top, total, BLOCK: tl.constexpr):
    """Return log Σ e^z_s over all ids, given the largest and the sum relative to it of the shared
    ones; the ids that the teacher lacks are part of CE only."""
    at = tl.arange(0, BLOCK)
    for start in range(shared, vocab, BLOCK):
        inside = start + at < vocab
        z_s = tl.load(student + start + at, inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(z_s, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z_s - new), 0)
        top = new
    return top + tl.log(total)


@triton.jit
def _sum_at_t1(student, teacher, found, shared, top_s, top_t, BLOCK: tl.constexpr):
    """Find and store KL(teacher ‖ student) at T = 1, the teacher's entropy and the student's;
    `top_s` and `top_t` are the largest logits.

    It reads the logits by itself: in the loop of `_sum_up` these sums take 30 registers more, and
    half as many tokens would be computed at a time.
    """
    at = tl.arange(0, BLOCK)
    sum_s = 0.0
    sum_t = 0.0
    mean_s = 0.0
    mean_t = 0.0
    gap = 0.0
    for start in range(0, shared, BLOCK):
        inside = start + at < shared
        z_s = tl.load(student + start + at, inside, other=-float("inf")).to(tl.float32)
        z_t = tl.load(teacher + start + at, inside, other=-float("inf")).to(tl.float32)

        # Both largest logits are known, so that nothing is rescaled.
        e_s = tl.exp(z_s - top_s)
        e_t = tl.exp(z_t - top_t)
        sum_s += tl.sum(e_s, 0)
        sum_t += tl.sum(e_t, 0)
        mean_s += tl.sum(tl.where(inside, e_s * z_s, 0.0), 0)
        mean_t += tl.sum(tl.where(inside, e_t * z_t, 0.0), 0)
        gap += tl.sum(tl.where(inside, e_t * (z_t - z_s), 0.0), 0)

    lse_s = top_s + tl.log(sum_s)
    lse_t = top_t + tl.log(sum_t)
    _store_at_t1(found, gap / sum_t - lse_t + lse_s, lse_t - mean_t / sum_t, lse_s - mean_s / sum_s)


@triton.jit
def _store_at_t1(found, kl, entropy_t, entropy_s):
    """Store what is logged at T = 1 in the columns that `forward_kl.VALUES` gives it."""
    tl.store(found + 4, kl)
    tl.store(found + 5, entropy_t)
    tl.store(found + 6, entropy_s)


@triton.jit
def _write_shared(
    student, teacher, shared, inverse_t, lse_1, lse_s, lse_t, gap, label, ce_weight, kd_weight,
    HAS_CE: tl.constexpr, AT_1: tl.constexpr, IS_HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the shared ids, and return the student's entropy, 0 unless AT_1, and
    the two sums of `near_kl`, 0 unless IS_HIGH: Σ p·(e^d - 1 - d) and max |d|, d being the
    log-ratio less its mean."""
    at = tl.arange(0, BLOCK)
    entropy = 0.0
    series = 0.0
    farthest = 0.0
    for start in range(0, shared, BLOCK):
        column = start + at
        inside = column < shared
        z_s = tl.load(student + column, inside, other=-float("inf")).to(tl.float32)
        z_t = tl.load(teacher + column, inside, other=-float("inf")).to(tl.float32)

        # (1 - α)·(q - onehot) at T = 1, and α·T·(q - p) at T.
        p = tl.exp(z_t * inverse_t - lse_t)
        log_q = z_s * inverse_t - lse_s
        q = tl.exp(log_q)
        gradient = kd_weight * (q - p)
        if AT_1:
            entropy -= tl.sum(tl.where(inside, q * log_q, 0.0), 0)
        if HAS_CE:
            one_hot = tl.where(column == label, 1.0, 0.0)
            gradient += ce_weight * (tl.exp(z_s - lse_1) - one_hot)
        if IS_HIGH:
            d = tl.where(inside, (z_s - z_t) * inverse_t + gap, 0.0)
            farthest = tl.maximum(farthest, tl.max(tl.abs(d), 0))
            rest = 1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d / 720))
            series += tl.sum(p * (d * d * (0.5 + d * rest)), 0)
        tl.store(student + column, gradient.to(student.dtype.element_ty), inside)
    return entropy, series, farthest


@triton.jit
def _write_rest(
    student, shared, vocab, lse_1, label, ce_weight, HAS_CE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradient of the ids that the teacher lacks."""
    at = tl.arange(0, BLOCK)
    for start in range(shared, vocab, BLOCK):
        column = start + at
        inside = column < vocab
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_CE:
            z_s = tl.load(student + column, inside, other=-float("inf")).to(tl.float32)
            one_hot = tl.where(column == label, 1.0, 0.0)
            gradient = ce_weight * (tl.exp(z_s - lse_1) - one_hot)
        tl.store(student + column, gradient.to(student.dtype.element_ty), inside)
