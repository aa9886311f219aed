"""The logits of both models for one chunk of tokens, and quantities computed from them.

A divergence gets a `Pair` and reads what its formula needs. Probabilities are computed on first use
and kept, so that a divergence and the metrics share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ds_kd.losses.buffers import Buffers

_BLOCK = 64  # logits in which a CPU looks for the largest at one time
_TOP = 5
#: Logits of one model in a block of rows, on a CPU and a GPU: few enough that the tensors of a
#: formula are small beside those of a chunk, and enough that a GPU is busy.
OF_BLOCK, OF_BLOCK_ON_GPU = 2**21, 2**24
#: Above this temperature log-ratios are of the order of 1/T and divergences of 1/T², while the
#: log-sum-exps that they are computed from are about ten: their difference in fp32 is too inexact.
HIGH_TEMPERATURE = 8.0
#: |log-ratio| up to which the series of `divergences.near_kl` is exact to 1e-5.
NEAR = 0.5


class Pair:
    """Both models' logits of one chunk over the ids that they share, divided by T.

    Args:
        student, teacher: z/T, `[tokens, vocab]`, in fp32 or wider.
        student_largest, teacher_largest: the largest logit of each token, `[tokens, 1]`.
        temperature: T, by which the logits are already divided.
        labels: `[tokens]` int64; -100 for a token that does not count.
        buffers: memory for the results.
        keeps_teacher: whether `teacher` must stay; if not, results are written over it.
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
        self.student, self._teacher = student, teacher
        self._is_teacher_gone = False
        self.temperature, self.labels, self.buffers = temperature, labels, buffers
        self._student_largest, self._teacher_largest = student_largest, teacher_largest
        self._room: Tensor | None = buffers.like("q", teacher) if keeps_teacher else teacher

    @property
    def teacher(self) -> Tensor:
        """z_t/T `[rows, vocab]`.

        Raises:
            ValueError: its room is used for other things already.
        """
        if self._is_teacher_gone:
            raise ValueError(
                "reads the teacher's logits after they were given up: set reads_teacher_logits = "
                "True on its class"
            )
        return self._teacher

    @functools.cached_property
    def p(self) -> Tensor:
        """The teacher's probabilities `[tokens, vocab]`."""
        return torch.softmax(self.teacher, -1, out=self.buffers.like("p", self.teacher))

    @functools.cached_property
    def q(self) -> Tensor:
        """The student's probabilities `[tokens, vocab]`."""
        room, self._room = self._take_room(), None
        return torch.softmax(self.student, -1, out=room)

    @functools.cached_property
    def teacher_lse(self) -> Tensor:
        """log Σ e^(z_t/T) `[tokens, 1]`."""
        return log_sum_exp(self._teacher_largest, self.p)

    @functools.cached_property
    def student_lse(self) -> Tensor:
        """log Σ e^(z_s/T) `[tokens, 1]`."""
        return log_sum_exp(self._student_largest, self.q)

    def blocks(self) -> Iterator[tuple[slice, Pair]]:
        """Yield the rows of each block of a few tokens, and their pair.

        A block's tensors are small, so that a formula may make as many as it likes. At a high
        temperature they are in fp64.
        """
        tokens, vocab = self.student.shape
        on_cpu = self.student.device.type == "cpu"
        size = max(1, (OF_BLOCK if on_cpu else OF_BLOCK_ON_GPU) // vocab)
        is_high = self.temperature > HIGH_TEMPERATURE
        dtype = torch.float64 if is_high else self.student.dtype
        buffers = self.buffers.of_block(size, dtype)
        for start in range(0, max(1, tokens), size):  # no token makes one empty block
            rows = slice(start, start + size)
            logits = self._apply(lambda part: part[rows].to(dtype))  # noqa: B023
            yield rows, Pair(*logits, self.temperature, self.labels[rows], buffers)

    def at(self, temperature: float) -> Pair:
        """Return these logits at another temperature, with a teacher that may be overwritten."""
        ratio = self.temperature / temperature
        logits = self._apply(lambda part: part * ratio)
        return Pair(*logits, temperature, self.labels, self.buffers)

    def _apply(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the first four arguments of a pair, made from this one's."""
        largest = self._student_largest, self._teacher_largest
        return change(self.student), change(self.teacher), change(largest[0]), change(largest[1])

    @property
    def log_p(self) -> Tensor:
        """The teacher's log-probabilities `[tokens, vocab]`, a new tensor."""
        return self.teacher - self.teacher_lse

    @property
    def log_q(self) -> Tensor:
        """The student's log-probabilities `[tokens, vocab]`, a new tensor."""
        return self.student - self.student_lse

    @functools.cached_property
    def log_ratio(self) -> Tensor:
        """log q - log p `[tokens, vocab]`; exactly 0 where the models are the same."""
        return (self.student - self.teacher).sub_(self.student_lse - self.teacher_lse)

    @functools.cached_property
    def teacher_mean(self) -> Tensor:
        """Σ p·z_t/T `[tokens, 1]`; without `keeps_teacher` the last use of the teacher's logits."""
        return self.sum_of_products(self.p, self.teacher)

    @functools.cached_property
    def teacher_entropy(self) -> Tensor:
        """-Σ p·log p `[tokens, 1]`, nats."""
        return self.teacher_lse - self.teacher_mean

    @functools.cached_property
    def student_entropy(self) -> Tensor:
        """-Σ q·log q `[tokens, 1]`, nats; the product takes no memory of the vocabulary's size."""
        return self.student_lse - torch.bmm(self.q[:, None], self.student[:, :, None])[:, 0]

    @functools.cached_property
    def forward_kl(self) -> Tensor:
        """KL(teacher ‖ student) `[tokens, 1]`, nats.

        Σ p·z_t - Σ p·z_s - lse_t + lse_s: two sums of products instead of passes over log p and
        log q.
        """
        teacher_mean = self.teacher_mean
        student_mean = self.sum_of_products(self.p, self.student)
        return teacher_mean - student_mean - self.teacher_lse + self.student_lse

    @functools.cached_property
    def top5_agreement(self) -> Tensor:
        """The share of the teacher's five likeliest ids that are among the student's,
        `[tokens, 1]`."""
        theirs, ours = (find_top(z, _TOP) for z in (self.teacher, self.student))
        shared = (theirs[:, :, None] == ours[:, None, :]).any(-1)
        return shared.to(self.student.dtype).mean(-1, keepdim=True)

    def sum_of_products(self, a: Tensor, b: Tensor) -> Tensor:
        """Return Σ a·b of each token, `[tokens, 1]`."""
        return torch.mul(a, b, out=self._take_room()).sum(-1, keepdim=True)

    def _take_room(self) -> Tensor:
        """Return room for `[tokens, vocab]`: the teacher's logits, where they need not stay."""
        if self._room is None:  # q lies there
            return self.buffers.like("products", self.student)
        self._is_teacher_gone = self._room is self._teacher
        return self._room


def log_sum_exp(largest: Tensor, probabilities: Tensor) -> Tensor:
    """Return log Σ e^z `[tokens, 1]` of logits z whose softmax is known.

    Args:
        largest: max z of each token, `[tokens, 1]`. Its probability e^(max - lse) is at least
            1/vocab, so that the logarithm is safe.
        probabilities: softmax of z, `[tokens, vocab]`.
    """
    return largest - probabilities.amax(-1, keepdim=True).log()


def find_largest(logits: Tensor) -> Tensor:
    """Return the index of each token's largest logit, `[tokens, 1]`.

    On a CPU torch's argmax takes five times as long as its `amax`, so the block that holds the
    largest is found by `amax` first.
    """
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % _BLOCK:
        return logits.argmax(-1, keepdim=True)
    blocks = logits.view(rows, vocab // _BLOCK, _BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + inside.argmax(-1, keepdim=True)


def find_top(logits: Tensor, count: int) -> Tensor:
    """Return the indices of each token's largest logits, `[tokens, count]` or fewer.

    On a CPU they are looked for as in `find_largest`, which takes a fifth of torch's `topk`.
    """
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % _BLOCK or vocab < count * _BLOCK:
        return logits.topk(min(count, vocab), -1).indices
    blocks = logits.view(rows, vocab // _BLOCK, _BLOCK)
    chosen = blocks.amax(-1).topk(count, -1).indices
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    place = inside.topk(count, -1).indices
    return chosen.gather(1, place // _BLOCK) * _BLOCK + place % _BLOCK
