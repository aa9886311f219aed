"""The logits of both models for one chunk of tokens, and what follows from them.

A divergence is handed a `Pair` and takes from it what its formula needs. Probabilities are computed
when they are first asked for and kept, so that a divergence and what is measured beside it share
them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds_kd.losses.buffers import Buffers

_BLOCK = 64  # logits in which a CPU looks for the largest at one time


class Pair:
    """Both models' logits of one chunk over the ids that they share, divided by T.

    Args:
        student, teacher: z/T, `[rows, vocab]`, in fp32 or wider.
        student_largest, teacher_largest: the largest of each row, `[rows, 1]`.
        temperature: T, by which the logits are divided already.
        labels: `[rows]` int64; -100 where a row does not count.
        buffers: room for what is computed.
        keeps_teacher: whether `teacher` must stay; if not, its room is used for what is computed.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_largest: Tensor,
        teacher_largest: Tensor,
        temperature: float,
        labels: Tensor,
        buffers: Buffers,
        keeps_teacher: bool = True,
    ):
        self.student, self.teacher = student, teacher
        self.temperature, self.labels, self.buffers = temperature, labels, buffers
        self._student_largest, self._teacher_largest = student_largest, teacher_largest
        self._room: Tensor | None = buffers.like("q", teacher) if keeps_teacher else teacher

    @functools.cached_property
    def p(self) -> Tensor:
        """The teacher's probabilities `[rows, vocab]`."""
        return torch.softmax(self.teacher, -1, out=self.buffers.like("p", self.teacher))

    @functools.cached_property
    def q(self) -> Tensor:
        """The student's probabilities `[rows, vocab]`."""
        room, self._room = self._room, None
        assert room is not None
        return torch.softmax(self.student, -1, out=room)

    @functools.cached_property
    def teacher_lse(self) -> Tensor:
        """log Σ e^(z_t/T) `[rows, 1]`."""
        return log_sum_exp(self._teacher_largest, self.p)

    @functools.cached_property
    def student_lse(self) -> Tensor:
        """log Σ e^(z_s/T) `[rows, 1]`."""
        return log_sum_exp(self._student_largest, self.q)

    @property
    def log_p(self) -> Tensor:
        """The teacher's log-probabilities `[rows, vocab]`, a new tensor."""
        return self.teacher - self.teacher_lse

    @property
    def log_q(self) -> Tensor:
        """The student's log-probabilities `[rows, vocab]`, a new tensor."""
        return self.student - self.student_lse

    @functools.cached_property
    def teacher_mean(self) -> Tensor:
        """Σ p·z_t/T `[rows, 1]`; without `keeps_teacher` the last use of the teacher's logits."""
        return self.sum_of_products(self.p, self.teacher)

    @functools.cached_property
    def teacher_entropy(self) -> Tensor:
        """-Σ p·log p `[rows, 1]`, nats."""
        return self.teacher_lse - self.teacher_mean

    @functools.cached_property
    def forward_kl(self) -> Tensor:
        """KL(teacher ‖ student) `[rows, 1]`, nats.

        Σ p·z_t - Σ p·z_s - lse_t + lse_s: two sums of products instead of passes over log p and
        log q.
        """
        teacher_mean = self.teacher_mean
        student_mean = self.sum_of_products(self.p, self.student)
        return teacher_mean - student_mean - self.teacher_lse + self.student_lse

    def sum_of_products(self, a: Tensor, b: Tensor) -> Tensor:
        """Return Σ a·b of each row, `[rows, 1]`."""
        room = self._room if self._room is not None else self.buffers.like("products", a)
        return torch.mul(a, b, out=room).sum(-1, keepdim=True)


def log_sum_exp(largest: Tensor, probabilities: Tensor) -> Tensor:
    """Return log Σ e^z `[rows, 1]` of logits z whose softmax is known.

    Args:
        largest: max z of each row, `[rows, 1]`. Its probability e^(max - lse) is at least 1/vocab,
            so that the logarithm is safe.
        probabilities: softmax of z, `[rows, vocab]`.
    """
    return largest - probabilities.amax(-1, keepdim=True).log()


def find_largest(logits: Tensor) -> Tensor:
    """Return the index of each row's largest, `[rows, 1]`.

    torch's own argmax takes five times as long on a CPU as its `amax`: the block that holds the
    largest is found first.
    """
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % _BLOCK:
        return logits.argmax(-1, keepdim=True)
    blocks = logits.view(rows, vocab // _BLOCK, _BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + inside.argmax(-1, keepdim=True)
