"""Scores of single tokens from hidden states, a chunk of tokens at a time and without a gradient:
log-probabilities of given tokens, and the distance between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.buffers import Buffers
from ds_kd.losses.head import States
from ds_kd.losses.pair import Pair, find_largest

_CHUNK = 256  # tokens whose logits exist at one time

#: The first positions of the parts of a text for which validation tells the KL by itself.
PARTS = (0, 64, 256, 1024, 4096)

#: Measured by `compare_models` for each token, in the order of its columns.
DISTANCES = ("forward_kl", "reverse_kl", "acceptance", "top1_agreement", "top5_agreement")


def score_labels(states: States, labels: Tensor) -> Tensor:
    """Return the log-probabilities of given tokens, `[rows, labels]` in fp32 or wider, nats.

    Args:
        states: hidden states `[rows, hidden]` and the whole head.
        labels: `[rows, labels]` int64, one or more tokens after each row; a negative one stands
            for none, and its score means nothing.
    """
    dtype = torch.promote_types(states.hidden.dtype, torch.float32)
    scores = torch.empty(labels.shape, dtype=dtype, device=labels.device)
    buffers = Buffers(_CHUNK, dtype, states.hidden.device)
    for rows in _chunks(len(labels)):
        logits = states.logits(rows, states.head.weight.shape[0], "student", buffers)
        # Not logsumexp: on a CPU this is 1e-5 too high for each token of a sure model, and other
        # programs, with which the sums over hundreds of tokens are compared, do the same.
        logits = torch.log_softmax(logits, -1, out=buffers.like("q", logits))
        scores[rows] = logits.gather(1, labels[rows].clamp(min=0))
    return scores


def compare_models(student: States, teacher: Any, labels: Tensor, vocab: int) -> Tensor:
    """Return `[rows, 5]`, the `DISTANCES` of each row's two distributions of the next token at
    T = 1: KL(teacher ‖ student) and KL(student ‖ teacher) in nats, the acceptance 1 - TVD =
    Σ min(p, q), whether both name the same token first, and the share of the teacher's first five
    tokens that are among the student's.

    Args:
        student: hidden states `[rows, hidden]` and the whole head.
        teacher: a teacher's output for the same rows (`ds_kd.teachers.base`).
        labels: `[rows]` int64, the tokens that follow.
        vocab: number of ids that both models share.
    """
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    found = torch.empty((len(labels), len(DISTANCES)), dtype=dtype, device=labels.device)
    buffers = Buffers(_CHUNK, dtype, student.hidden.device)
    with teacher.open() as source:
        for rows in _chunks(len(labels)):
            z_s = student.logits(rows, vocab, "student", buffers)
            z_t = source.logits(rows, vocab, "teacher", buffers)
            largest = (z_s.amax(-1, keepdim=True), z_t.amax(-1, keepdim=True))
            found[rows] = _measure(Pair(z_s, z_t, *largest, 1.0, labels[rows], buffers))
    return found


def describe(pair: Pair) -> dict[str, Tensor]:
    """Return what every step logs of logits at T = 1, `[tokens, 1]` each: KL(teacher ‖ student) and
    both entropies, by which runs are compared whatever their loss and T."""
    return {
        "teacher_entropy_at_t1": pair.teacher_entropy,
        "kl_at_t1": pair.forward_kl,
        "student_entropy_at_t1": pair.student_entropy,
    }


def measure_in_blocks(
    pair: Pair, measure: Callable[[Pair], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what `measure` finds of a chunk's tokens, a few of them at a time, and leave the
    logits as they are."""
    found: dict[str, list[Tensor]] = {}
    for _, block in pair.blocks():
        for name, values in measure(block).items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def describe_health(pair: Pair) -> dict[str, Tensor]:
    """Return what validation logs of logits at T = 1, whatever loss and T the run has,
    `[tokens, 1]` each: both KLs, both entropies, the acceptance rate Σ min(p, q) of speculative
    decoding, and the agreement of the likeliest five."""
    p, q = pair.p, pair.q
    return {
        **describe(pair),
        "reverse_kl_at_t1": (q * pair.log_ratio).sum(-1, keepdim=True),
        "acceptance_at_t1": 1.0 - 0.5 * (q - p).abs().sum(-1, keepdim=True),
        "top5_agreement": pair.top5_agreement,
    }


def split_by_position(kl: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Return the KL of the tokens of each part of a text, 0 for the others, and which tokens these
    are, `[tokens, 1]` each; `average` makes means of their sums.

    Args:
        kl: `[tokens, 1]`.
        positions: of the tokens in their samples, `[tokens]`.
    """
    part = torch.bucketize(positions, torch.tensor(PARTS, device=positions.device), right=True) - 1
    found: dict[str, Tensor] = {}
    for number, start in enumerate(PARTS):
        is_here = (part == number)[:, None].to(kl.dtype)
        found |= {f"kl_at_t1_from_{start}": kl * is_here, f"share_from_{start}": is_here}
    return found


def average(sums: dict[str, float], tokens: int) -> dict[str, float]:
    """Return the means of sums over supervised tokens; those of a part of the text are over its own
    tokens, and left out where it has none."""
    means = {name: total / tokens for name, total in sums.items()}
    for start in PARTS:
        share, name = means.pop(f"share_from_{start}", 0.0), f"kl_at_t1_from_{start}"
        if share:
            means[name] /= share
        else:
            means.pop(name, None)
    return means


def _measure(pair: Pair) -> Tensor:
    p, q = pair.p, pair.q
    log_ratio = pair.log_ratio
    best = (find_largest(z)[:, 0] for z in (pair.teacher, pair.student))
    columns = (
        0.0 - (p * log_ratio).sum(-1),  # of equal models 0, and not -0
        (q * log_ratio).sum(-1),
        torch.minimum(p, q).sum(-1),
        torch.eq(*best).to(p.dtype),
        pair.top5_agreement[:, 0],
    )
    return torch.stack(columns, dim=-1)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK))
