"""A teacher that lives on the student's ranks: ZeRO-Inference, run again for every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_kd.losses.head import States
from ds_kd.models.causal_lm import FrozenModel
from ds_kd.parallel.engines import gathered


class ResidentTeacher:
    """`teacher(batch)` → hidden states at the supervised positions, and the head to come.

    Args:
        engine: DeepSpeed's, around a `FrozenModel`.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, batch: dict[str, Any]) -> ResidentOutput:
        return ResidentOutput(self.engine(batch), self.engine.module)


@dataclass(frozen=True)
class ResidentOutput:
    """Hidden states `[supervised tokens, hidden]`; the sharded head is gathered when opened."""

    hidden: Tensor
    model: FrozenModel

    @contextmanager
    def open(self) -> Iterator[States]:
        with gathered([*self.model.model.get_output_embeddings().parameters()]):
            yield States(self.hidden, self.model.head())
