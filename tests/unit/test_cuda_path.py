"""What can be proved of the path on CUDA without a GPU: shapes, strides, and operations counted on
meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_kd.losses.buffers import Buffers
from ds_kd.losses.head import Gradients, Head, States


class Calls(TorchDispatchMode):
    """Records each operation of torch with its arguments, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, dict[Any, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.made.append((str(func), {**dict(enumerate(args)), **kwargs}))
        return func(*args, **kwargs)

    def of(self, name: str) -> list[dict[Any, Any]]:
        """Return the arguments of each call of an operation."""
        return [arguments for made, arguments in self.made if made == name]


@pytest.mark.parametrize("vocab", [151_665, 151_936])  # Qwen2.5: shared ids, and a whole head
def test_rows_of_a_gpus_products_are_aligned_whatever_the_vocabulary_is(vocab):
    """Off a CPU; meta tensors have the strides of a GPU's."""
    meta = torch.device("meta")
    states = States(
        torch.empty(5, 8, dtype=torch.bfloat16, device=meta),
        Head(torch.empty(vocab, 8, dtype=torch.bfloat16, device=meta)),
    )
    buffers = Buffers(5, torch.float32, meta)
    with Calls() as calls:
        logits = states.logits(slice(0, 5), vocab, "student", buffers)
        Gradients(states, torch.float32, [True, False, False]).add(
            slice(0, 5), torch.empty_like(logits), logits, torch.ones(5, device=meta), buffers
        )
    assert logits.shape == (5, vocab)
    first, second = calls.of("aten.mm.out")
    assert first["out"].stride(0) * 2 % 16 == 0 and second[0].stride(0) * 2 % 16 == 0
