"""A teacher on the student's own ranks, in a ZeRO-Inference engine that runs for every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_kd.losses.head import States
from ds_kd.models.causal_lm import FrozenModel
from ds_kd.parallel.engines import gather
from ds_kd.teachers.window import Window, join


class ResidentTeacher:
    """Runs the teacher on a batch and returns its hidden states at the supervised positions.

    Args:
        engine: DeepSpeed engine of a `FrozenModel`.
        window: how many micro-batches of a step one pass takes, if its layers are divided
            (`window.divide_layers`); None takes them one by one.
    """

    def __init__(self, engine: Any, window: Window | None = None):
        self.engine, self.window = engine, window

    def next_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Return the likeliest next token at each supervised position, `[rows]` (a collective)."""
        return self.engine(batch, probe="next_tokens")

    def __call__(self, batch: dict[str, Any]) -> ResidentOutput:
        hidden, model = self.engine(batch), self.engine.module
        return ResidentOutput(hidden, model, model.layers.take())

    def answer(self, batches: Sequence[dict[str, Any]], tokens: float) -> Iterator[ResidentOutput]:
        """Return the outputs for the micro-batches of a step; see `base.TakesSteps`."""
        size = 1 if self.window is None else self.window.count(tokens)
        for start in range(0, len(batches), size):
            some = batches[start : start + size]
            if len(some) == 1:
                yield self(some[0])
                continue
            # The head stays gathered from the first loss to the last one.
            with ExitStack() as head:
                yield from self._run(some, head)

    def _run(self, batches: Sequence[dict[str, Any]], head: ExitStack) -> list[ResidentOutput]:
        """Return the outputs of one pass over micro-batches.

        Args:
            head: holds the gathered head from its first use on.
        """
        hidden, model = self.engine(join(batches)), self.engine.module
        counts = [len(batch["supervised"]) for batch in batches]
        layers = {number: part.split(counts) for number, part in model.layers.take().items()}
        shared = _Gathered(model, head)
        return [
            ResidentOutput(states, model, {n: parts[k] for n, parts in layers.items()}, shared)
            for k, states in enumerate(hidden.split(counts))
        ]


class _Gathered:
    """The head of a teacher, gathered when it is first asked for and kept until `stack` closes."""

    def __init__(self, model: FrozenModel, stack: ExitStack):
        self.model, self._stack = model, stack
        self._is_open = False

    def open(self) -> None:
        if not self._is_open:
            self._stack.enter_context(_gather_head(self.model))
            self._is_open = True


@contextmanager
def _gather_head(model: FrozenModel) -> Iterator[None]:
    with gather([*model.model.get_output_embeddings().parameters()]):
        yield


@dataclass(frozen=True)
class ResidentOutput:
    """Hidden states `[supervised tokens, hidden]`; `open` gathers the sharded head.

    `layers` has the outputs of the layers that a loss compares, `[supervised tokens, width]`;
    `shared` is a head that several outputs keep gathered.
    """

    hidden: Tensor
    model: FrozenModel
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    shared: _Gathered | None = None

    @contextmanager
    def open(self) -> Iterator[States]:
        if self.shared is not None:
            self.shared.open()
            yield States(self.hidden, self.model.head())
            return
        with _gather_head(self.model):
            yield States(self.hidden, self.model.head())
