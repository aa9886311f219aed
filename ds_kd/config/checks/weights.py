"""Look into the files of a local model: its configuration, and the headers of its weights.

A header tells the names and places of all tensors in a file, so nothing large is read and torch is
not needed.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from ds_kd.config.components import Component, problem
from ds_kd.config.sections import Peft
from ds_kd.errors import first_line
from ds_kd.files import NotPlainFileError, read_plain_file

_MAX_BYTES = 100_000_000
#: Models whose linear maps have the same names in their files and in memory.
_SAME_NAMES = {
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "olmo2", "olmo3",
    "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
_OTHERS = ("norm", "embed", "lm_head")  # parts of the names of weights that get no adapter
#: Models whose positions see those after them, unless `is_decoder` is set where they have it.
_ENCODERS = {
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "modernbert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Other files in which transformers looks for weights; what is in them is left to the run.
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json")
#: Arguments of from_pretrained that choose other files or names.
_CHOOSERS = ("variant", "use_safetensors", "key_mapping", "state_dict", "config")


def find_wrong_files(directory: Path, kwargs: dict[str, Any]) -> str:
    """Return what is wrong with the configuration or the weights of a model, or an empty text.

    Args:
        directory: one with a config.json.
        kwargs: the arguments of from_pretrained.
    """
    try:
        config = json.loads(read_plain_file(directory / "config.json", _MAX_BYTES))
    except (OSError, NotPlainFileError, RecursionError) as error:
        return f"its config.json cannot be read: {first_line(error)}"
    except ValueError as error:
        return f"its config.json is not JSON: {first_line(error)}"
    if not isinstance(config, dict):
        return f"its config.json holds {type(config).__name__}, not a mapping"
    kind = config.get("model_type")
    if kind in _ENCODERS and not (config | kwargs).get("is_decoder"):
        return f"its config.json describes an encoder ({kind}), which predicts no next token"

    if how := config.get("quantization_config"):
        kind = how.get("quant_method") if isinstance(how, dict) else how
        return f"its weights are quantised ({kind}); name a model of bf16 or fp32 weights"

    # Weights that transformers finds in another way are left to the run.
    if config.get("transformers_weights") or any(kwargs.get(name) for name in _CHOOSERS):
        return ""
    try:
        names = [*_read_headers(directory)]
    except (OSError, NotPlainFileError) as error:
        return f"its weights cannot be read: {first_line(error)}"
    except ValueError as error:
        return str(error)
    absent = _find_absent(names, config | kwargs) if kind in _SAME_NAMES else ""
    return f"its files lack {absent}" if absent else ""


def _read_headers(directory: Path) -> dict[str, dict[str, Any]]:
    """Return what the headers of a model's safetensors files tell of each tensor, by its name:
    `dtype` and `shape`; nothing if it has other files.

    Raises:
        ValueError: a file is absent or damaged; says which.
    """
    if (directory / _WEIGHTS).is_file():
        return _read_header(directory / _WEIGHTS)
    if not (directory / _INDEX).is_file():
        if any((directory / name).is_file() for name in _OTHER_WEIGHTS):
            return {}
        raise ValueError(f"it has no weights (no {_WEIGHTS})")
    try:
        placed = json.loads(read_plain_file(directory / _INDEX, _MAX_BYTES))["weight_map"]
        files = sorted({str(file) for file in placed.values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"its {_INDEX} is damaged") from None

    # Every rank reads all files, so each has to be here.
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        if not (directory / file).is_file():
            raise ValueError(f"it has no {file}, which its {_INDEX} names")
        found |= _read_header(directory / file)
    absent = sorted({*placed} - {*found})
    if absent:
        raise ValueError(f"{placed[absent[0]]} lacks {absent[0]}, which {_INDEX} places there")
    return found


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a safetensors file's header, by the names of its tensors.

    Raises:
        ValueError: it is none, or not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if length <= min(size, _MAX_BYTES) else b""
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is no whole safetensors file") from None
    if size != needed:
        raise ValueError(f"{path.name} has {size} bytes and not {needed}, as its header says")
    entries: dict[str, dict[str, Any]] = header
    return entries


def _find_absent(names: list[str], config: dict[str, Any]) -> str:
    """Return a weight that a decoder whose layers are all alike needs and has not, or an empty
    text. A weight is needed in a layer if at least half of the layers hold it."""
    if not names:
        return ""
    of_layers: dict[int, set[str]] = {}
    prefix = ""
    for name in names:
        if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
            of_layers.setdefault(int(match[1]), set()).add(name[match.end() :])
            prefix = name[: match.start(1)]

    # The number of layers is the configuration's, as all weights of one may be absent.
    count = config.get("num_hidden_layers")
    for each in sorted({part for parts in of_layers.values() for part in parts}):
        holds = [number for number, parts in of_layers.items() if each in parts]
        if not isinstance(count, int) or 2 * len(holds) < len(of_layers):
            continue
        for number in range(count):
            if number not in holds:
                return f"{prefix}{number}.{each}"

    needed = ["model.embed_tokens.weight"]
    needed += ["lm_head.weight"] if config.get("tie_word_embeddings") is False else []
    return next((part for part in needed if not any(part.endswith(n) for n in names)), "")


def read_config(component: Component) -> dict[str, Any]:
    """Return the content of a local model's config.json; nothing where it cannot be told here."""
    name = component.kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or component.kwargs.get("gguf_file") is not None:
        return {}
    path = Path(name, str(component.kwargs.get("subfolder") or ""), "config.json")
    try:
        found = json.loads(read_plain_file(path, _MAX_BYTES))
    except (OSError, ValueError, NotPlainFileError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_matrices(component: Component) -> dict[str, tuple[str, int]] | None:
    """Return dtype and width of each matrix in the files of a local model, by its name; None where
    they cannot be told here, and an empty mapping if the model has no safetensors files."""
    config, given = read_config(component), component.kwargs
    if config.get("model_type") not in _SAME_NAMES:
        return None
    directory = given["pretrained_model_name_or_path"], str(given.get("subfolder") or "")
    try:
        tensors = _read_headers(Path(*directory))
        matrices = {name: each for name, each in tensors.items() if len(each["shape"]) == 2}
        return {name: (each["dtype"], each["shape"][1]) for name, each in matrices.items()}
    except (OSError, NotPlainFileError, ValueError, TypeError, KeyError):  # told by other checks
        return None


def find_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the language model, as transformers reads it:
    a model of images or sound too has that in `text_config`, whose own model_type counts."""
    nested = config.get("text_config")
    return config | {"model_type": None} | nested if isinstance(nested, dict) else config


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
        tensors = _read_headers(directory) if config.get("model_type") in _SAME_NAMES else {}
        maps = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        kinds = {name.rpartition(".")[2] for name in maps}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(kind for kind in kinds if not any(part in kind for part in _OTHERS))
