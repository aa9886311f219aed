"""A language-model head as plain tensors: its logits, a chunk at a time, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kd.losses.buffers import Buffers

#: A bias that is lower counts as this much. -inf, which bars an id, leaves a probability of 0 as
#: this does, but 0·∞ is not a number.
LOWEST = -1e6


@dataclass(frozen=True)
class Head:
    """A head that computes `softcap·tanh(scale·(h Wᵀ + b)/softcap)`.

    Args:
        weight: `[vocab, hidden]`.
        bias: `[vocab]` or None.
        scale: multiplies the logits (Cohere's `logit_scale`, the inverse of Granite's
            `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[tokens, vocab]` of hidden states `[tokens, hidden]`."""
        out = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out


@dataclass(frozen=True)
class States:
    """A model's hidden states of some tokens, and the head that computes their logits.

    It has the protocol of a teacher's output (`ds_kd.teachers.base`).

    Args:
        hidden: `[tokens, hidden]`.
        head: the whole head, not a shard.
        layers: outputs of chosen layers by number, `[tokens, width]`.
    """

    hidden: Tensor
    head: Head
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[States]:
        yield self

    def logits(self, rows: slice, vocab: int, name: str, buffers: Buffers) -> Tensor:
        """Return the first `vocab` logits of some tokens, `[tokens, vocab]`, in the buffer `name`.

        The product is rounded to the model's dtype, as it is in the model itself. If the buffers
        keep products, and the head changes them no further, it is returned in this dtype.
        """
        head, hidden = self.head, self.hidden[rows]
        is_same = hidden.dtype == buffers.dtype
        stays = buffers.keeps_products and head.scale == 1.0 and head.softcap is None
        if is_same:
            product = buffers.get(name, len(hidden), vocab)
        else:
            place = name if stays else "product"
            product = buffers.for_product(place, len(hidden), vocab, hidden.dtype)

        # Both forms write where they are told to, so that no chunk allocates.
        weight = head.weight[:vocab].t()
        if head.bias is None:
            torch.mm(hidden, weight, out=product)
        else:
            lowest = max(LOWEST, torch.finfo(head.bias.dtype).min)
            torch.addmm(head.bias[:vocab].clamp(min=lowest), hidden, weight, out=product)
        out = product if is_same or stays else buffers.get(name, len(hidden), vocab).copy_(product)
        if head.scale != 1.0:
            out.mul_(head.scale)
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out


class Gradients:
    """Accumulates d loss / d (hidden, weight, bias) chunk by chunk.

    Args:
        states: the student's.
        dtype: dtype in which the head's gradient is summed.
        wanted: whether each of the three is needed; the others stay None.
    """

    def __init__(self, states: States, dtype: torch.dtype, wanted: list[bool]):
        self.states = states
        head, bias = states.head, states.head.bias
        self.found = (
            torch.empty_like(states.hidden) if wanted[0] else None,
            torch.empty_like(head.weight, dtype=dtype) if wanted[1] else None,
            torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None,
        )

    def add(
        self, rows: slice, gradient: Tensor, logits: Tensor, valid: Tensor, buffers: Buffers
    ) -> None:
        """Add the part of one chunk.

        Args:
            rows: the chunk's tokens; the first chunk begins at 0.
            gradient: with respect to `logits`, `[tokens, vocab]`; both are overwritten.
            valid: how often a token counts, 0 for none, `[tokens]`.
        """
        head, hidden = self.states.head, self.states.hidden[rows]
        to_hidden, to_weight, to_bias = self.found
        if head.softcap is not None:  # tanh' = 1 - tanh²
            gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1.0))
        # Applied to [tokens, hidden], as a pass over [tokens, vocab] would take far longer.
        factor = valid * head.scale
        if hidden.dtype != gradient.dtype:
            tokens, vocab = gradient.shape
            rounded = buffers.for_product("product", tokens, vocab, hidden.dtype)
            gradient = rounded.copy_(gradient)

        if to_hidden is not None:
            torch.mm(gradient, head.weight, out=to_hidden[rows])
            to_hidden[rows].mul_(factor[:, None])
        scaled = (hidden * factor[:, None]).to(hidden.dtype)
        if to_weight is not None:
            _add_product(to_weight, gradient.t(), scaled, is_first=rows.start == 0)
        if to_bias is not None:
            to_bias.add_(gradient.t() @ factor.to(gradient.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Add a·b to a sum; the first product takes the place of what is there."""
    beta = 0.0 if is_first else 1.0  # 0: not read
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif _adds_wider(total.device, a.dtype, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


@functools.cache
def _adds_wider(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether this device adds a product of narrow matrices to a wide one without rounding
    the product first. A GPU does."""
    if device.type == "cpu":
        return False
    a = torch.ones(16, 16, dtype=narrow, device=device)
    total = torch.zeros(16, 16, dtype=wide, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, wide, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True
