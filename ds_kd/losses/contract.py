"""Try a loss on a few tokens before any model is loaded, and refuse one that breaks the contract.

The step divides one sum by one count, over all micro-batches and ranks. A loss that returns a mean,
counts masked tokens or has no graph would silently train another model, or hang a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import describe_user_error
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import Head, States

_TOKENS, _VOCAB, _HIDDEN = 6, 11, 8
_CUT = slice(0, 2), slice(2, None)
_CLOSE = 1e-3  # relative; rounding of fp32 sums over a few tokens is a thousand times smaller


def check_divergence(loss: Any, vocab: int = _VOCAB) -> None:
    """Refuse a loss `loss(student_logits, teacher_logits, labels)` that breaks the contract.

    Args:
        vocab: ids that the models share.

    Raises:
        ValueError: says which part of the contract (docs/losses.md) is broken.
    """
    _check_module(loss)
    student, teacher, labels = _Example(vocab), _Example(vocab, seed=1), _make_labels(vocab)
    z_s, z_t = (part.logits.detach() for part in (student, teacher))
    z_s.requires_grad_()
    _check_clauses(lambda rows, y: loss(z_s[rows], z_t[rows], y), z_s, labels)
    same = float(loss(z_t.clone(), z_t, labels))
    if not abs(same) <= _CLOSE:
        raise ValueError(
            f"equal logits of both models give {same:.4g}, expected 0; return a divergence, such "
            f"as a KL, not a cross-entropy"
        )
    if not hasattr(loss, "of_chunk"):
        return

    # As the step computes it: with a softmax shared with CE, without one, and without CE.
    ce = MaskedCrossEntropy()
    for extra, alpha in ((0, 0.5), (2, 0.5), (0, 1.0)):
        whole = _Example(vocab + extra)
        z_s = whole.logits
        kd = loss(z_s[:, :vocab], z_t, labels)
        sums = {"ce_loss": ce(z_s, labels), "kd_loss": kd}
        (slope,) = torch.autograd.grad(
            (1.0 - alpha) * sums["ce_loss"] + alpha * kd, whole.states.hidden
        )
        distillation = DistillationLoss(ce, loss, alpha, vocab)
        _check_chunked(distillation, whole.states, labels, teacher.states, sums, slope)


def check_cross_entropy(loss: Any, vocab: int = _VOCAB) -> None:
    """Refuse a loss `loss(student_logits, labels)` that breaks the contract.

    Args:
        vocab: ids of the student.

    Raises:
        ValueError: as `check_divergence`.
    """
    _check_module(loss)
    student, labels = _Example(vocab), _make_labels(vocab)
    z_s = student.logits.detach().requires_grad_()
    _check_clauses(lambda rows, y: loss(z_s[rows], y), z_s, labels)
    if hasattr(loss, "of_chunk"):
        value = loss(student.logits, labels)
        (slope,) = torch.autograd.grad(value, student.states.hidden)
        distillation = DistillationLoss(loss, KDLoss(), 0.0)
        sums = {"ce_loss": value}
        _check_chunked(distillation, student.states, labels, None, sums, slope)


def _check_chunked(
    loss: DistillationLoss,
    student: States,
    labels: Tensor,
    teacher: States | None,
    sums: dict[str, Tensor],
    slope: Tensor,
) -> None:
    """Refuse a loss whose form for chunks differs from its call, in value or gradient.

    Args:
        sums: what the calls give, by name.
        slope: their weighted gradient with respect to the student's hidden states.
    """
    value, found = loss(student, labels, teacher)
    for name, expected in sums.items():
        if not _is_close(found[name].item(), expected.item()):
            raise ValueError(
                f"its of_chunk gives {found[name].item():.4g} in all and its call "
                f"{expected.item():.4g} (of the {name}); override `value` (and `of_chunk`, if it "
                f"is there) instead of `__call__`"
            )
    (gradient,) = torch.autograd.grad(value, student.hidden)
    error = (gradient - slope).abs().max().item()
    if not error <= _CLOSE * max(1.0, slope.abs().max().item()):
        raise ValueError(
            f"the gradient of its of_chunk differs by {error:.3g} from that of its value; return "
            f"d value / d(z_s/T)"
        )


class _Example:
    """A model's states of some tokens, and its logits with a graph to the hidden states."""

    def __init__(self, vocab: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(_TOKENS, _HIDDEN, generator=generator).requires_grad_()
        weight = torch.randn(vocab, _HIDDEN, generator=generator) / _HIDDEN**0.5
        self.states = States(hidden, Head(weight))
        self.logits = self.states.head.logits(hidden)


def _make_labels(vocab: int) -> Tensor:
    return torch.arange(_TOKENS) % vocab


def _check_module(loss: Any) -> None:
    if not callable(loss):
        raise ValueError(f"gives {type(loss).__name__}, which cannot be called with logits")
    names = [name for name, _ in loss.named_parameters()] if isinstance(loss, nn.Module) else []
    if names:
        raise ValueError(
            f"has parameters ({', '.join(names)}), which nothing trains; make them buffers, or "
            f"leave them out"
        )


def _check_clauses(
    evaluate: Callable[[Tensor, Tensor], Any], student: Tensor, labels: Tensor
) -> None:
    """Check the clauses of the contract that both kinds of loss share.

    Args:
        evaluate: the loss of some tokens of the example, given their indices and labels.
        student: the student's logits `[tokens, vocab]`, with a graph.
        labels: `[tokens]`.
    """
    # A sum over tokens: twice the tokens give twice the value, and parts add up to the whole.
    rows = torch.arange(_TOKENS)
    value = _evaluate(evaluate, rows, labels, student, "6 tokens")
    twice = _evaluate(evaluate, rows.repeat(2), labels.repeat(2), student, "12 tokens")
    if not _is_close(twice, 2.0 * value):
        raise ValueError(
            f"the same tokens twice give {twice / value if value else twice:.3g} times the value, "
            f"expected 2; return the sum over tokens, not a mean"
        )
    parts = [_evaluate(evaluate, rows[k], labels[k], student, "a part") for k in _CUT]
    if not _is_close(sum(parts), value):
        raise ValueError(
            f"6 tokens give {value:.4g}, and 2 and 4 of them {parts[0]:.4g} and {parts[1]:.4g}; "
            f"each token's share must not depend on the others, as a step is cut into parts"
        )

    # Masked tokens do not count, and a rank without any supervised token gets 0.
    masked = labels.clone()
    masked[::2] = IGNORE_INDEX
    kept = _evaluate(evaluate, rows[1::2], labels[1::2], student, "3 tokens")
    some = _evaluate(evaluate, rows, masked, student, f"labels of {IGNORE_INDEX}")
    if not _is_close(some, kept):
        raise ValueError(
            f"tokens labelled {IGNORE_INDEX} change the value from {kept:.4g} to {some:.4g}; leave "
            f"them out of the sum"
        )
    nothing = _evaluate(evaluate, rows[:0], labels[:0], student, "no token")
    if nothing != 0.0:
        raise ValueError(f"no token at all gives {nothing:.4g}, expected 0")


def _evaluate(
    evaluate: Callable[[Tensor, Tensor], Any],
    rows: Tensor,
    labels: Tensor,
    student: Tensor,
    what: str,
) -> float:
    """Return the loss of an example, if it is a finite scalar with a finite gradient.

    Raises:
        ValueError: it is not.
    """
    try:
        value = evaluate(rows, labels)
    except Exception as error:  # a user's loss may raise anything
        told = describe_user_error(error)
        raise ValueError(f"fails on a small example ({what}): {told}") from error
    if not isinstance(value, Tensor) or value.ndim:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else value
        raise ValueError(f"returns {given!s}, expected a scalar tensor: the sum over tokens")
    if not torch.isfinite(value):
        raise ValueError(f"is {value.item()} for {what}, expected a finite number")

    # No graph would leave ZeRO-3's backward collectives out on this rank.
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, student, allow_unused=True)
    if slope is None:
        raise ValueError(
            f"has no gradient with respect to the student's logits ({what}); compute it with torch "
            f"operations on them, without detach or item"
        )
    if not torch.isfinite(slope).all():
        raise ValueError(f"has a gradient that is not finite for {what}")
    return value.item()


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(abs(a), abs(b)) + 1e-6
