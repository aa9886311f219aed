"""Compare the maps that `peft` names with the names of the weights in the student's files."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ds_kd.config.components import Component, problem
from ds_kd.config.schema import Peft
from ds_kd.errors import NotPlainFileError, read_plain_file

_MAX_BYTES = 100_000_000
#: Models whose linear maps have the same names in their files and in memory.
_SAME_NAMES = {
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "olmo2", "olmo3",
    "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
_OTHERS = ("norm", "embed", "lm_head")  # parts of the names of weights that get no adapter


def find_unknown_map(student: Component, peft: Peft) -> str | None:
    """Return the problem of a `target_modules` word that names no map of a local model, or None.

    Patterns and whole names are left to the run, and so are models that are not known here.
    """
    name = student.kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or student.kwargs.get("gguf_file") is not None:
        return None
    directory = Path(name, str(student.kwargs.get("subfolder") or ""))
    words = [word for word in peft.target_modules if not {"*", "."} & {*word} and word != "lm_head"]
    kinds = _kinds_of_maps(directory) if words else []
    unknown = next((word for word in words if kinds and word not in kinds), None)
    if unknown is None:
        return None

    # The words are those of `models.lora.find_linear_maps`, which needs torch.
    near = difflib.get_close_matches(unknown, kinds, n=1)
    hint = f"no linear map is called {unknown}; there are {', '.join(kinds)}"
    hint += f"; did you mean {near[0]}?" if near else ""
    expected = f"names of linear maps of {name}"
    return problem("peft.target_modules", peft.target_modules, expected, hint)


def _kinds_of_maps(directory: Path) -> list[str]:
    """Return the last parts of the names of a model's linear maps; none where they cannot be told
    from its files."""
    try:
        config = json.loads(read_plain_file(directory / "config.json", _MAX_BYTES))
        names = _names_of_weights(directory) if config.get("model_type") in _SAME_NAMES else []
        maps = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        kinds = {name.rpartition(".")[2] for name in maps}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(kind for kind in kinds if not any(part in kind for part in _OTHERS))


def _names_of_weights(directory: Path) -> list[str]:
    """Return the names of the tensors in a model's safetensors files, by their index or header."""
    index: Any
    try:
        index = json.loads(read_plain_file(directory / "model.safetensors.index.json", _MAX_BYTES))
        return [*index["weight_map"]]
    except (OSError, NotPlainFileError):
        pass
    with (directory / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return [*json.loads(file.read(length))] if length <= _MAX_BYTES else []
