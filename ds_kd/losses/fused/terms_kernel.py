"""The Triton kernel of `terms.py`: CE and any divergence that is a sum over the vocabulary.

It is the template of all such divergences. Each is a function of log p and log q that returns, for
every id, its term v of the value and u = q·∂D/∂q:

    D = Σ v,        d D / d(z_s/T) = u - q·Σu.

A program has one token and reads the logits of both models for the log-sum-exps, for the sums of v
and u, for what is logged at T = 1, unless T is 1, and for the gradient. All arithmetic is in fp32.
Where both models agree on a token, u and v of every function here are exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_kd.losses.fused.kernel import _open_row, _store_at_t1, _sum_at_t1, _sum_up, _write_rest


@triton.jit
def distil_row_by(
    student, teacher, labels, found, shared, vocab, student_step, teacher_step,
    inverse_t, ce_weight, kd_weight, first, second,
    TERMS: tl.constexpr, HAS_CE: tl.constexpr, AT_1: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute CE and a divergence of one token, and write their gradient over its student logits.

    Args:
        first, second: the divergence's own arguments, 0 where it has fewer.
        TERMS: one of the functions of `TERMS_BY_NAME`.

    The others are those of `kernel.distil_row`; `found` receives the columns of `terms.COLUMNS`.
    """
    student, teacher, found, label, label_logit = _open_row(
        student, teacher, labels, found, student_step, teacher_step, COLUMNS
    )

    # log q as (z - largest)/T - log_s is more exact than z/T less a log-sum-exp.
    lse_1, lse_s, lse_t, mean_t, gap, agrees, top_s, sum_s, top_t, sum_t = _sum_up(
        student, teacher, shared, vocab, inverse_t, BLOCK
    )
    log_s = tl.log(sum_s)
    log_t = tl.log(sum_t)
    value, total, entropy_s = _sum_terms(
        student, teacher, shared, inverse_t, top_s, log_s, top_t, log_t, first, second,
        TERMS, AT_1, BLOCK,
    )  # fmt: skip
    tl.store(found + 0, lse_1 - label_logit)
    tl.store(found + 1, value)
    tl.store(found + 2, lse_t - mean_t)
    tl.store(found + 3, agrees)
    if AT_1:
        _store_at_t1(found, gap - lse_t + lse_s, lse_t - mean_t, entropy_s)
    else:
        _sum_at_t1(student, teacher, found, shared, top_s, top_t, BLOCK)

    _write_terms(
        student, teacher, shared, inverse_t, lse_1, top_s, log_s, top_t, log_t, total, label,
        ce_weight, kd_weight, first, second, TERMS, HAS_CE, BLOCK,
    )  # fmt: skip
    _write_rest(student, shared, vocab, lse_1, label, ce_weight, HAS_CE, BLOCK)


@triton.jit
def _sum_terms(
    student, teacher, shared, inverse_t, top_s, log_s, top_t, log_t, first, second,
    TERMS: tl.constexpr, AT_1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return Σ v and Σ u over the shared ids, and the student's entropy, 0 unless AT_1."""
    at = tl.arange(0, BLOCK)
    value = 0.0
    total = 0.0
    entropy = 0.0
    for start in range(0, shared, BLOCK):
        inside = start + at < shared
        z_s = tl.load(student + start + at, inside, other=0.0).to(tl.float32)
        z_t = tl.load(teacher + start + at, inside, other=0.0).to(tl.float32)
        log_p = (z_t - top_t) * inverse_t - log_t
        log_q = (z_s - top_s) * inverse_t - log_s
        v, u = TERMS(log_p, log_q, first, second)
        value += tl.sum(tl.where(inside, v, 0.0), 0)
        total += tl.sum(tl.where(inside, u, 0.0), 0)
        if AT_1:
            entropy -= tl.sum(tl.where(inside, tl.exp(log_q) * log_q, 0.0), 0)
    return value, total, entropy


@triton.jit
def _write_terms(
    student, teacher, shared, inverse_t, lse_1, top_s, log_s, top_t, log_t, total, label,
    ce_weight, kd_weight, first, second,
    TERMS: tl.constexpr, HAS_CE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the shared ids."""
    at = tl.arange(0, BLOCK)
    for start in range(0, shared, BLOCK):
        column = start + at
        inside = column < shared
        z_s = tl.load(student + column, inside, other=0.0).to(tl.float32)
        z_t = tl.load(teacher + column, inside, other=0.0).to(tl.float32)

        # (1 - α)·(q - onehot) at T = 1, and α·T·(u - q·Σu) at T.
        log_p = (z_t - top_t) * inverse_t - log_t
        log_q = (z_s - top_s) * inverse_t - log_s
        _, u = TERMS(log_p, log_q, first, second)
        gradient = kd_weight * (u - tl.exp(log_q) * total)
        if HAS_CE:
            one_hot = tl.where(column == label, 1.0, 0.0)
            gradient += ce_weight * (tl.exp(z_s - lse_1) - one_hot)
        tl.store(student + column, gradient.to(student.dtype.element_ty), inside)


@triton.jit
def _reverse_kl(log_p, log_q, first, second):
    """Return the terms of Σ q·r with r = log q - log p, whose ∂/∂q is r up to a constant."""
    u = tl.exp(log_q) * (log_q - log_p)
    return u, u


@triton.jit
def _tvd(log_p, log_q, first, second):
    """Return the terms of ½·Σ|q - p|."""
    q = tl.exp(log_q)
    difference = q - tl.exp(log_p)
    sign = tl.where(difference > 0, 0.5, 0.0) - tl.where(difference < 0, 0.5, 0.0)
    return 0.5 * tl.abs(difference), q * sign


@triton.jit
def _jsd(log_p, log_q, first, second):
    """Return the terms of β·KL(p ‖ m) + (1 - β)·KL(q ‖ m); `first` is β."""
    of_q, of_p, _ = _compare_with_mixture(log_q - log_p, first)
    u = (first - 1.0) * tl.exp(log_q) * of_q
    return u - first * tl.exp(log_p) * of_p, u


@triton.jit
def _skew_forward(log_p, log_q, first, second):
    """Return the terms of KL(p ‖ a·p + (1 - a)·q); `first` is a, and ∂/∂q is (a - 1)·(p/m - 1) up
    to a constant."""
    _, of_p, gap = _compare_with_mixture(log_q - log_p, first)
    u = (first - 1.0) * (1.0 - first) * tl.exp(log_q) * gap
    return -tl.exp(log_p) * of_p, u


@triton.jit
def _skew_reverse(log_p, log_q, first, second):
    """Return the terms of KL(q ‖ (1 - a)·p + a·q); `first` is a, and ∂/∂q is
    log(q/m) - a·(q/m - 1) up to a constant."""
    of_q, _, gap = _compare_with_mixture(log_q - log_p, 1.0 - first)
    q = tl.exp(log_q)
    return -q * of_q, q * (first * (1.0 - first) * gap - of_q)


@triton.jit
def _alpha_beta(log_p, log_q, first, second):
    """Return the terms of the α-β-divergence; `first` is α and `second` β. As in `AlphaBeta`, all
    powers are relative to those of the larger of p and q."""
    r = log_q - log_p
    above = tl.maximum(r, 0.0)
    below = tl.maximum(-r, 0.0)
    both = first + second
    larger = tl.exp(both * tl.maximum(log_p, log_q))
    of_p = _expm1(-first * above)
    upper = of_p - first / both * _expm1(-both * above)
    lower = _expm1(-second * below) - second / both * _expm1(-both * below)
    u = _expm1(-first * below) * tl.exp(-second * below) - of_p
    return -larger * (upper + lower) / (first * second), larger * u / first


@triton.jit
def _compare_with_mixture(r, share):
    """Return log(m/q), log(m/p) and (p - q)/m of m = share·p + (1 - share)·q, exactly 0 where r is;
    see `named.mixed.log_of_mixture`."""
    near = tl.minimum(tl.maximum(r, -80.0), 80.0)
    excess = _expm1(-near)  # p/q - 1
    of_q = _log1p(share * excess)
    return of_q, of_q + near, excess / (1.0 + share * excess)


@triton.jit
def _expm1(x):
    """Return e^x - 1. Triton's own function is there on a GPU only."""
    series = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x / 40320)))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """Return log(1 + x), near 0 by the series of 2·artanh(x/(2 + x))."""
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 7 + square * (1.0 / 9 + square * (1.0 / 11 + square / 13))
    series = 1.0 / 3 + square * (1.0 / 5 + square * series)
    return tl.where(tl.abs(x) < 0.5, 2.0 * s * (1.0 + square * series), tl.log(1.0 + x))


#: By the name of the divergence.
TERMS_BY_NAME = {
    "reverse_kl": _reverse_kl,
    "tvd": _tvd,
    "jsd": _jsd,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
    "alpha_beta": _alpha_beta,
}
