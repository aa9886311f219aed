"""The outputs of chosen layers of a model, kept while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ds_kd.models.prune import find_layers


class LayerOutputs:
    """Keeps the output of chosen layers at the supervised positions, from one forward pass.

    Args:
        model: an HF model.
        numbers: the layers, from 0.

    Raises:
        PruneError: the model has no single list of layers.
    """

    def __init__(self, model: Any, numbers: Iterable[int] = ()):
        self._whole: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._is_open = False
        self._numbers = sorted(set(numbers))
        if self._numbers:
            total = model.config.get_text_config().num_hidden_layers
            parent, attribute = find_layers(model, total)
            for number in self._numbers:
                layer = getattr(parent, attribute)[number]
                layer.register_forward_hook(self._make_hook(number))

    def _make_hook(self, number: int) -> Any:
        # It keeps what there is and computes nothing: a checkpointed layer runs again in backward,
        # and must do the same operations there.
        def hook(_: Any, __: Any, output: Any) -> None:
            if self._is_open:
                self._whole[number] = output[0] if isinstance(output, tuple) else output

        return hook

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """Keep the outputs at these positions of the pass inside this block."""
        self._is_open = True
        try:
            yield
            for number, output in self._whole.items():
                self._rows[number] = output.flatten(0, -2).index_select(0, rows)
        finally:
            self._is_open = False
            self._whole.clear()

    def take(self) -> dict[int, Tensor]:
        """Return the outputs of the last pass by number, `[rows, width]`, and keep them no
        longer."""
        taken, self._rows = self._rows, {}
        return taken
