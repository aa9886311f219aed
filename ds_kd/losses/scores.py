"""Scores of single tokens from hidden states, a chunk of tokens at a time and without a gradient:
log-probabilities of given tokens, and the distance between two models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.buffers import Buffers
from ds_kd.losses.head import States
from ds_kd.losses.pair import Pair

_CHUNK = 256  # tokens whose logits exist at one time
_TOP = 5

#: What `compare_models` measures of each token, in the order of its columns.
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


def _measure(pair: Pair) -> Tensor:
    p, q = pair.p, pair.q
    log_ratio = pair.log_ratio
    top = min(_TOP, p.shape[1])
    theirs, ours = pair.teacher.topk(top, -1).indices, pair.student.topk(top, -1).indices
    shared = (theirs[:, :, None] == ours[:, None, :]).any(-1)
    columns = (
        0.0 - (p * log_ratio).sum(-1),  # of equal models 0, and not -0
        (q * log_ratio).sum(-1),
        torch.minimum(p, q).sum(-1),
        (theirs[:, 0] == ours[:, 0]).to(p.dtype),
        shared.to(p.dtype).mean(-1),
    )
    return torch.stack(columns, dim=-1)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK))
