"""The names that a model's files give its weights.

transformers 5 keeps some models under names of its own in memory (the experts of a layer in one
tensor, GPT-NeoX's layers renamed). Other tools, and transformers 4, read the files' names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor


class FileNames:
    """Hands weights on under their files' names, holding those of one layer at most.

    What becomes one weight of the file, or is cut into several, is always of one layer.

    Args:
        model: of transformers; its weights may be anywhere, or nowhere.
        write: called with a name and a tensor.
    """

    def __init__(self, model: Any, write: Callable[[str, Tensor], None]):
        self._model, self._write = model, write
        self._layer: str | None = None
        self._held: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        layer = re.match(r"(?:[^.]+\.)*?\d+\.", name)
        if layer is None or layer[0] != self._layer:
            self.flush()
        self._layer = layer and layer[0]
        self._held[name] = tensor

    def flush(self) -> None:
        """Hand on what is held; to be called after the last weight."""
        from transformers.core_model_loading import revert_weight_conversion

        held, self._held = self._held, {}
        for name, tensor in revert_weight_conversion(self._model, held).items() if held else ():
            # A part of a tensor would keep the whole of it in memory.
            self._write(name, tensor.clone() if tensor._is_view() else tensor)
