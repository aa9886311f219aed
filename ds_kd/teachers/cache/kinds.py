"""The part of a teacher's output that a cache keeps for each supervised token.

Hidden states serve every loss at every temperature. The likeliest ids with the rest as one, and
draws from the distribution, take a few hundred bytes or less; they hold the distribution at one
temperature, and serve the loss that reads no more of it than they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ds_kd.losses.buffers import Buffers
from ds_kd.losses.head import LOWEST, Head, States
from ds_kd.models.generation.sampling import Draw, uniforms
from ds_kd.teachers.base import TeacherOutput
from ds_kd.teachers.cache.store import CacheError, Fields

_ROWS = 128  # of which a partial kind looks at the logits at one time
_ONE = 2**40  # see `models.generation.sampling`


class Kind(Protocol):
    """The content of a cache's rows."""

    def make(self, output: Any, keys: np.ndarray) -> Fields:
        """Return the fields of rows, `[rows, …]` on the CPU, from the teacher's own output; a
        collective.

        Raises:
            CacheError: a number is too large for the stored ones.
        """

    def read(self, fields: Fields | None) -> TeacherOutput:
        """Return the output that a loss reads; of None that of no token."""

    def distance(self, found: Fields, stored: Fields) -> float:
        """Return how far new fields are from stored ones: 0 if they are the same, and about 1 if
        they are another teacher's."""


@dataclass(frozen=True)
class Hidden:
    """Hidden states, and the teacher's head in memory.

    Args:
        head: on the device.
        dtype: of the stored numbers.
    """

    head: Head
    dtype: torch.dtype

    def make(self, output: Any, keys: np.ndarray) -> Fields:
        hidden = output.hidden
        stored = hidden.to(self.dtype)
        if not torch.isfinite(stored).all() and torch.isfinite(hidden).all():
            raise CacheError(
                f"teacher.dtype: a hidden state of {hidden.abs().max().item():.3g} is too large "
                f"for {str(self.dtype).removeprefix('torch.')}; write bf16 or fp32"
            )
        return {"hidden": stored.cpu()}

    def read(self, fields: Fields | None) -> States:
        weight = self.head.weight
        if fields is None:
            return States(weight.new_empty((0, weight.shape[1])), self.head)
        hidden = fields["hidden"].to(weight.device, weight.dtype, non_blocking=True)
        return States(hidden, self.head)

    def distance(self, found: Fields, stored: Fields) -> float:
        return _far(found["hidden"], stored["hidden"])


@dataclass(frozen=True)
class TopK:
    """The k likeliest ids with their log-probabilities, and the logarithm of what is left.

    Args:
        k: number of ids, fewer than `vocab`.
        temperature: by which logits are divided.
        vocab: number of ids that the models share.
        device: where a loss reads.
    """

    k: int
    temperature: float
    vocab: int
    device: torch.device

    def make(self, output: Any, keys: np.ndarray) -> Fields:
        parts = []
        for _, logits in _chunks_of(output, len(keys), self.temperature, self.vocab):
            log_p = torch.log_softmax(logits, -1)
            top = log_p.topk(self.k)
            others = log_p.scatter(1, top.indices, -torch.inf)
            rest = torch.logsumexp(others, -1, keepdim=True)
            parts.append((top.indices.int(), top.values.float(), rest.clamp(min=LOWEST).float()))
        ids, log_p, rest = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        return {"ids": ids, "log_p": log_p, "rest": rest}

    def read(self, fields: Fields | None) -> Partial:
        return Partial(self._write, self.temperature, _move(fields, self.device))

    def _write(self, fields: Fields, out: Tensor) -> None:
        # The rest is spread evenly, so that its sum is what it was.
        each = fields["rest"].to(out.dtype) - float(np.log(out.shape[1] - self.k))
        out.copy_(each.expand_as(out))
        out.scatter_(1, fields["ids"].long(), fields["log_p"].to(out.dtype))

    def distance(self, found: Fields, stored: Fields) -> float:
        return _far(found["log_p"], stored["log_p"])


@dataclass(frozen=True)
class Sampled:
    """Draws from the distribution, each by a number that follows from the row's key.

    The mean of their gradient q - count/draws is that of forward KL, whose gradient is linear in
    the teacher's probabilities.

    Args:
        draws: number of draws.
        temperature, vocab, device: see `TopK`.
    """

    draws: int
    temperature: float
    vocab: int
    device: torch.device

    def make(self, output: Any, keys: np.ndarray) -> Fields:
        parts = []
        for rows, logits in _chunks_of(output, len(keys), self.temperature, self.vocab):
            names = [key.tobytes().hex() for key in keys[rows]]
            numbers = [uniforms(Draw(0, 0, name), self.draws) for name in names]
            drawn = torch.from_numpy(np.array(numbers).reshape(len(names), self.draws))
            parts.append(invert(logits, drawn.to(logits.device)).int().cpu())
        return {"ids": torch.cat(parts)}

    def read(self, fields: Fields | None) -> Partial:
        return Partial(self._write, self.temperature, _move(fields, self.device))

    def _write(self, fields: Fields, out: Tensor) -> None:
        ids = fields["ids"].long()
        share = torch.full(ids.shape, 1.0 / self.draws, dtype=out.dtype, device=out.device)
        out.zero_().scatter_add_(1, ids, share).log_().clamp_(min=LOWEST)

    def distance(self, found: Fields, stored: Fields) -> float:
        return (found["ids"] != stored["ids"]).double().mean().item()


def invert(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return the ids that numbers draw by inversion of the sum over ids, `[rows, draws]`.

    Args:
        logits: `[rows, vocab]`.
        numbers: `[rows, draws]`, fp64, from 0 to below 1.
    """
    wide = logits.double()
    weights = ((wide - wide.amax(-1, keepdim=True)).exp() * _ONE).long()
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    wanted = torch.minimum((numbers * total).long(), total - 1)
    return torch.searchsorted(sums, wanted, right=True)


@dataclass(frozen=True)
class Partial:
    """A teacher's output of which only a part is kept; it has the protocol of `teachers.base`.

    Args:
        write: writes log-probabilities `[tokens, vocab]` at the temperature, given fields.
        temperature: multiplies them, as the loss divides by it again.
        fields: of all tokens, on the device; None if there is no token.
    """

    write: Any
    temperature: float
    fields: Fields | None

    #: The rest is made up: metrics of the whole distribution would measure that.
    is_whole = False

    @contextmanager
    def open(self) -> Iterator[Partial]:
        yield self

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        if self.fields is None:
            return buffers.get(name, 0, vocab)
        fields = {field: value[rows] for field, value in self.fields.items()}
        out = buffers.get(name, len(next(iter(fields.values()))), vocab)
        self.write(fields, out)
        return out.mul_(self.temperature)


def _chunks_of(
    output: Any, rows: int, temperature: float, vocab: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time and their logits, divided by the temperature (a collective)."""
    with output.open() as opened:
        device = output.hidden.device
        buffers = Buffers(_ROWS, torch.float32, device)
        for start in range(0, max(1, rows), _ROWS):  # no row makes one empty chunk
            part = slice(start, start + _ROWS)
            yield part, opened.logits(part, vocab, "logits", buffers).div_(temperature)


def _move(fields: Fields | None, device: torch.device) -> Fields | None:
    if fields is None:
        return None
    return {name: value.to(device, non_blocking=True) for name, value in fields.items()}


def _far(found: Tensor, stored: Tensor) -> float:
    one, other = found.double(), stored.double()
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()
