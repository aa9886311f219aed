"""A teacher on the student's own ranks, in a ZeRO-Inference engine that runs for every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_kd.losses.head import States
from ds_kd.models.causal_lm import FrozenModel
from ds_kd.parallel.engines import gather


class ResidentTeacher:
    """Runs the teacher on a batch and returns its hidden states at the supervised positions.

    Args:
        engine: DeepSpeed engine of a `FrozenModel`.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def next_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return the likeliest next token at each supervised position, `[rows]` (a collective)."""
        return self.engine(batch, probe="next_tokens")

    def __call__(self, batch: dict[str, Any]) -> ResidentOutput:
        hidden, model = self.engine(batch), self.engine.module
        return ResidentOutput(hidden, model, model.layers.take())


@dataclass(frozen=True)
class ResidentOutput:
    """Hidden states `[supervised tokens, hidden]`; `open` gathers the sharded head.

    `layers` has the outputs of the layers that a loss compares, `[supervised tokens, width]`.
    """

    hidden: Tensor
    model: FrozenModel
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[States]:
        with gather([*self.model.model.get_output_embeddings().parameters()]):
            yield States(self.hidden, self.model.head())
