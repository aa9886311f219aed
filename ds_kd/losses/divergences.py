"""Divergences between the next-token distributions of student and teacher.

    L = (1 - α)·CE(student, labels) + α·T²·D( softmax(z_t/T), softmax(z_s/T) )

A divergence is one class here, in `ds_kd/losses/named/` or in a user's own file. It defines the
loss of whole logits (`__call__`) and that of some tokens (`of_chunk`): a value per token and its
gradient with respect to z_s/T. `ds_kd.losses.chunked` goes through the chunks and multiplies by α
and T²; it knows no divergence by name. The YAML does: `kd_loss_fn.name` is a class's `name`.

* **T².** d D/d z_s carries a factor 1/T, and the difference of the two distributions itself shrinks
  like 1/T: together 1/T². Multiplying by T² keeps the gradient's scale, hence the learning rate,
  independent of T (Hinton et al. 2015, section 2).
* **Sums, not means.** A loss is the sum over the valid tokens it was given. A step is cut into
  micro-batches and ranks with unequal numbers of valid tokens, and only the sum over the global
  count does not depend on the cut. The trainer divides once.
* **A zero with a graph.** Without any valid token the sum is exactly 0 and still connected to the
  student, so that ZeRO-3's backward collectives run on every rank.

Labels arrive already shifted: `labels[i]` is the token that position `i` must predict.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kd.data.labels import IGNORE_INDEX, check_ignore_index
from ds_kd.losses.head import LOWEST
from ds_kd.losses.pair import HIGH_TEMPERATURE, NEAR, Pair


class Divergence(ABC):
    """The interface of a distillation loss that is computed a chunk at a time.

    Args:
        ignore_index: as for `MaskedCrossEntropy`.
        temperature: T > 0, divides both models' logits.
        fp32_upcast: accepted without effect; logits are always compared in fp32 or wider.
        chunk_size: tokens whose logits exist at one time, for CE too; None takes the default of the
            device, 0 all tokens.

    Raises:
        ValueError: another ignore_index, a temperature that is not a positive number, or a
            chunk_size that is not an integer ≥ 0.
    """

    #: The word in `kd_loss_fn.name`. The config reads it, the arguments of `__init__` and `limits`
    #: from the source, so that both are written as literals.
    name = ""
    #: (argument, low, high): it must lie between these numbers, ends excluded; None is no limit.
    limits: tuple[tuple[str, float, float | None], ...] = ()

    #: True in a class of ours, and not its subclasses, whose place a kernel of `losses/fused` takes
    #: on a GPU.
    fuses = False
    #: Set to True if `of_chunk` makes next to no tensors of its own. It then gets a whole chunk
    #: instead of a few tokens at a time.
    takes_whole_chunks = False
    #: Set to False if such an `of_chunk` does not read `pair.teacher`; its memory is then reused.
    reads_teacher_logits = True

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        chunk_size: int | None = None,
    ):
        check_ignore_index(ignore_index)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 0):
            raise ValueError(f"chunk_size must be an integer ≥ 0 (tokens), got {chunk_size!r}")
        self.temperature = float(temperature)
        self.chunk_size = chunk_size

    def within(self, argument: str, value: float) -> float:
        """Return the value of an argument that lies between its `limits`.

        Raises:
            ValueError: it does not.
        """
        ((low, high),) = ((low, high) for name, low, high in self.limits if name == argument)
        if not (low < value < (math.inf if high is None else high)):
            ends = f"> {low}" if high is None else f"between {low} and {high}, ends excluded"
            raise ValueError(f"{argument} must be {ends}, got {value}")
        return value

    @abstractmethod
    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the divergence of every token, computed by its definition.

        Args:
            log_p, log_q: log-probabilities of teacher and student at temperature T,
                `[tokens, vocab]`.

        Returns:
            `[tokens]`, nats, without the factor T².
        """

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return T²·D, summed over valid tokens.

        Args:
            student_logits, teacher_logits: `[tokens, vocab]`.
            labels: `[tokens]` int64; only the mask of -100 is used.
        """
        valid = labels != IGNORE_INDEX
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        # As `Pair.blocks` does; a class that takes whole chunks has formulas for it.
        is_high = self.temperature > HIGH_TEMPERATURE and not self.takes_whole_chunks
        wide = torch.float64 if is_high else dtype
        # A bias of -inf that bars an id is as good as barred at -1e6 (`head.LOWEST`).
        log_q, log_p = (
            F.log_softmax(logits[valid].to(wide).clamp(min=LOWEST) / self.temperature, dim=-1)
            for logits in (student_logits, teacher_logits)
        )
        return (self.value(log_p, log_q).sum() * self.temperature**2).to(dtype)

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return the divergence of every token of a chunk or a part of it, and its gradient.

        This implementation differentiates `value` by autograd. A class with a formula for its
        gradient overrides it.

        Args:
            pair: both models' logits, divided by T.

        Returns:
            Values `[tokens, 1]`, nats, without T², and d value / d(z_s/T) `[tokens, vocab]`, which
            may be written over `pair.p`, `pair.q` or `pair.teacher`.
        """
        with torch.enable_grad():
            scaled = pair.student.detach().requires_grad_()
            values = self.value(pair.log_p, F.log_softmax(scaled, -1))
            (gradient,) = torch.autograd.grad(values.sum(), scaled)
        return values.detach()[:, None], gradient


class KDLoss(Divergence):
    """T²·KL(teacher ‖ student), the *forward* KL (Hinton et al. 2015, arXiv:1503.02531).

    The student must give probability to every token that the teacher gives some. The reverse KL
    looks similar and trains another model. With p = softmax(z_t/T) and q = softmax(z_s/T),

        KL = Σ p·(log p - log q),        d KL / d(z_s/T) = q - p.
    """

    name = "forward_kl"
    takes_whole_chunks = True
    fuses = True

    @property
    def reads_teacher_logits(self) -> bool:  # type: ignore[override]
        return self.temperature > HIGH_TEMPERATURE

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        # kl_div(input=log q, target=log p) is KL(p ‖ q): the teacher is the target.
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return (
            near_kl(log_q - log_p, log_p.exp(), kl[:, None])[:, 0]
            if self.reads_teacher_logits
            else kl
        )

    def of_chunk(self, pair: Pair) -> tuple[Tensor, Tensor]:
        return self._kl(pair), pair.q.sub_(pair.p)

    def of_chunk_with_softmax(self, pair: Pair, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the values and the joint gradient (1 - α)·q + α·(q - p) of CE and KL at T = 1,
        without the one-hot of the labels.

        This shortcut is optional. A divergence that has it must read `pair.student_lse` before it
        overwrites q.
        """
        return self._kl(pair), pair.q.sub_(pair.p, alpha=alpha)

    def _kl(self, pair: Pair) -> Tensor:
        if not self.reads_teacher_logits:
            return pair.forward_kl
        return near_kl(pair.student - pair.teacher, pair.p, pair.forward_kl)


def near_kl(difference: Tensor, p: Tensor, otherwise: Tensor) -> Tensor:
    """Return KL(p ‖ q) of distributions that nearly agree, without cancellation.

    With d the difference less its mean under p, KL = log(1 + Σ p·(e^d - 1 - d)): no term of the
    sum is negative, and an error of the mean enters squared only. e^d - 1 - d is its power series.

    Args:
        difference: (z_s - z_t)/T `[tokens, vocab]`, up to a constant for each token.
        p: the teacher's probabilities `[tokens, vocab]`.
        otherwise: the KL by its definition `[tokens, 1]`, for tokens with large log-ratios.

    Returns:
        `[tokens, 1]`, nats.
    """
    d = difference - (p * difference).sum(-1, keepdim=True)
    is_near = d.detach().abs().amax(-1, keepdim=True) <= NEAR
    d = d.clamp(-NEAR, NEAR)  # so that tokens not chosen have finite gradients
    series = 1 / 24 + d * (1 / 120 + d / 720)
    series = d * d * (0.5 + d * (1 / 6 + d * series))
    return torch.where(is_near, torch.log1p((p * series).sum(-1, keepdim=True)), otherwise)
