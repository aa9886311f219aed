"""The student's own base as its teacher: its weights without the trained adapter, in the same
engine, bare or under an adapter that is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.head import States
from ds_kd.models import lora


class SharedBaseTeacher:
    """Runs the base of a student that trains an adapter, with that adapter off and without dropout;
    a frozen adapter of the model (`lora.add_frozen_adapter`) is on.

    No second set of weights exists, and no second engine. The head is the student's own, which
    never has an adapter, and which ZeRO-3 has gathered while the loss reads it.

    Args:
        engine: DeepSpeed engine of a `Student` whose model has an adapter.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, batch: dict[str, Any]) -> States:
        hidden, student = self._ask(batch, "hidden"), self.engine.module
        return States(hidden, student.head(), student.layers.take())

    def next_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return the likeliest next token at each supervised position, `[rows]` (a collective)."""
        return self._ask(batch, "next_tokens")

    @torch.no_grad()
    def _ask(self, batch: dict[str, Any], probe: str) -> Tensor:
        student = self.engine.module
        was_training = student.training
        student.train(False)
        try:
            with lora.switch_to_teacher(student.model):
                answer: Tensor = self.engine(batch, probe=probe)
        finally:
            student.train(was_training)
        return answer
