"""Write a model's files under the names that other tools read.

transformers 5 keeps some models under names of its own in memory (the experts of a layer in one
tensor, GPT-NeoX's layers renamed), and the settings of rotary embeddings in one dict. Transformers
4, and tools that go by it, read the names that were there before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


class FileNames:
    """Renames weights to the names of the model's files, and holds those of one layer at most.

    Weights that are merged or split on the way belong to one layer.

    Args:
        model: a model of transformers; its weights are not read and may be on the meta device.
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
        """Write the weights that are held; call this after the last weight."""
        from transformers.core_model_loading import revert_weight_conversion

        held, self._held = self._held, {}
        for name, tensor in revert_weight_conversion(self._model, held).items() if held else ():
            # A view would keep its whole tensor in memory.
            self._write(name, tensor.clone() if tensor._is_view() else tensor)


def write_config(config: Any, directory: Path) -> None:
    """Write `config.json`, with the settings of rotary embeddings under the earlier keys too.

    A tool that looks for `rope_theta` and finds only `rope_parameters` would use the default of the
    architecture without a warning, and compute other logits.

    Args:
        config: a configuration of transformers.
        directory: created if it does not exist.

    Raises:
        OSError: it cannot be written.
    """
    config.save_pretrained(directory)
    path = directory / "config.json"
    written = path.read_text(encoding="utf-8")
    content = json.loads(written)
    ropes = [part["rope_parameters"] for part in _parts_with_rope(content)]
    for part in list(_parts_with_rope(content)):
        for key, value in _earlier_keys(part).items():
            part.setdefault(key, value)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # Newer architectures read an earlier key in place of the whole `rope_parameters`.
    if not _reads_back(config, directory, ropes):
        path.write_text(written, encoding="utf-8")


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer's files, its class and tokens under the names that transformers 4 knows.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        OSError: it cannot be written.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reads_back(config: Any, directory: Path, ropes: list[Any]) -> bool:
    try:
        content = type(config).from_pretrained(directory).to_dict()
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return [part["rope_parameters"] for part in _parts_with_rope(content)] == ropes


def _parts_with_rope(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config and its nested configs (text, vision) that have rotary embeddings."""
    if isinstance(content.get("rope_parameters"), dict):
        yield content
    for name in sorted(content):
        if name != "rope_parameters" and isinstance(content[name], dict):
            yield from _parts_with_rope(content[name])


def _earlier_keys(part: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of transformers 4 for the `rope_parameters` of a config."""
    parameters, kind = part["rope_parameters"], part.get("model_type", "")
    theta, factor, local = "rope_theta", "partial_rotary_factor", "rope_local_base_freq"
    if kind.startswith("gpt_neox"):
        theta, factor = "rotary_emb_base", "rotary_pct"
    elif kind.startswith("modernbert"):
        theta, local = "global_rope_theta", "local_rope_theta"

    # Where kinds of layers differ, the plain keys are those of layers with full attention.
    sliding = parameters.get("sliding_attention")
    full = parameters.get("full_attention") if isinstance(sliding, dict) else parameters
    if not isinstance(full, dict):
        return {}
    renamed = {"rope_theta": theta, "partial_rotary_factor": factor}
    found = {new: full[name] for name, new in renamed.items() if full.get(name) is not None}
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in full.items() if k not in renamed}
    if isinstance(sliding, dict) and sliding.get("rope_theta") not in (None, found.get(theta)):
        found[local] = sliding["rope_theta"]
    return found
