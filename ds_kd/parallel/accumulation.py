"""Sum the student's gradient over the micro-batches of a step.

DeepSpeed exchanges the gradients of ZeRO-3 in every backward pass, and adds up the shards. A rank
that has the memory for whole gradients can add these up instead and exchange the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Bytes of a trained weight that a sum of whole gradients takes: the gradient itself, and for one
#: of 16 bits a sum in fp32 beside it.
BYTES_OF_SUM = {4: 4, 2: 6}


#: Share of a rank's memory that whole gradients may fill: later batches may be larger.
FULL = 0.8


@dataclass
class Once:
    """The choice whether a step exchanges its gradients once.

    Args:
        always: every step does.
        needed: bytes that whole gradients take, if that is to be found out; else None.
        memory: bytes of a rank.
    """

    always: bool = False
    needed: int | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        self._steps = 0

    def decide(self, peaks: Sequence[float]) -> bool:
        """Return the choice for the next step, the same on every rank.

        The first step of a process shows what the others take. Once there was room, it stays.

        Args:
            peaks: the most memory that each rank has used, GiB.
        """
        self._steps += 1
        if not self.always and self.needed is not None and self._steps > 1:
            self.always = max(peaks) * 2**30 + self.needed <= FULL * self.memory
        return self.always


@contextmanager
def accumulate(engine: Any, once: bool) -> Iterator[Callable[[Tensor], None]]:
    """Return the backward pass of a step's micro-batches, for use inside this block.

    Args:
        engine: the student's.
        once: exchange the gradients when the block ends (a collective), not in every pass.
    """

    def backward(loss: Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)

    if not once:
        yield backward
        return

    # DeepSpeed's own `coalesce_grad_reduction` wants to count micro-batches itself; and it ends
    # with an exchange after an error too, when other ranks may have stopped elsewhere.
    optimizer, sums = engine.optimizer, _Sums(engine)
    engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = True

    def add(loss: Tensor) -> None:
        backward(loss)
        sums.take()

    yield add
    engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = False
    sums.give_back()
    engine._flush_coalesced_reduction_zero3(optimizer)


class _Sums:
    """Sums in fp32 of gradients of 16 bits. Those of 32 bits autograd adds up itself."""

    def __init__(self, engine: Any):
        self._parameters = [
            p for p in engine.module.parameters() if p.requires_grad and p.dtype != torch.float32
        ]
        self._sums: dict[Tensor, Tensor] = {}

    def take(self) -> None:
        """Add the gradients of a backward pass, and set them to 0."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(gradient)
            else:
                self._sums[parameter] = gradient.float()
            gradient.zero_()

    def give_back(self) -> None:
        """Put the sums where the gradients were, rounded once."""
        for parameter, total in self._sums.items():
            parameter.grad.copy_(total)  # type: ignore[union-attr]
        self._sums.clear()
