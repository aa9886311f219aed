"""Read the headers of a model's safetensors files, before any rank loads them.

Under ZeRO-3 only rank 0 opens the files, and an error in the middle of loading would leave the
other ranks waiting. So every rank reads the headers first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_NAME = "model.safetensors"
_INDEX = f"{_NAME}.index.json"
_ROWS = 8192  # of a matrix, compared at one time


class WeightFiles:
    """Names, shapes, dtypes and values of the tensors in a model's files.

    Args:
        name: directory or hub id.
        where: arguments that choose the files: `revision`, `cache_dir`, `subfolder`, `token`.

    Raises:
        SafetensorError: a file is damaged.
    """

    def __init__(self, name: str, where: dict[str, Any]):
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors writes them: BF16, F32
        for path in _paths(name, where):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    self._file_of[key] = path
                    part = file.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()

    def find(self, parameter: str, prefix: str = "") -> str | None:
        """Return the name that the files give a parameter, with or without the prefix of the body,
        or None if they lack it."""
        short = parameter.removeprefix(f"{prefix}.") if prefix else parameter
        names = (parameter, short, f"{prefix}.{parameter}")
        return next((name for name in names if name in self.shapes), None)

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two matrices are equal; holds a few thousand rows of each in memory."""
        if self.shapes[first] != self.shapes[second]:
            return False
        with (
            safe_open(self._file_of[first], "pt") as a,
            safe_open(self._file_of[second], "pt") as b,
        ):
            left, right = a.get_slice(first), b.get_slice(second)
            rows = range(0, self.shapes[first][0], _ROWS)
            return all(torch.equal(left[r : r + _ROWS], right[r : r + _ROWS]) for r in rows)


def _paths(name: str, where: dict[str, Any]) -> list[Path]:
    """Return the safetensors files that transformers would read; none if there are no such
    files."""
    from transformers.utils import cached_file

    where = {key: value for key, value in where.items() if key != "trust_remote_code"}

    def find(file: str) -> Path | None:
        try:
            path = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False)
        except OSError:  # loading reports it
            return None
        return None if path is None else Path(path)

    if (whole := find(_NAME)) is not None:
        return [whole]
    if (index := find(_INDEX)) is None:
        return []
    shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return [path for path in map(find, shards) if path is not None]


def empty_model(config: Any, **kwargs: Any) -> Any:
    """Return the model of a configuration on the meta device, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kwargs)


def find_differing_ties(files: WeightFiles, model: Any) -> list[tuple[str, str]]:
    """Return the pairs of parameters that the configuration ties although the files hold different
    values for them.

    Under ZeRO-3 transformers would drop one value of each pair without a warning.

    Args:
        files: the model's files.
        model: the model of the configuration, from `empty_model`.
    """
    pairs = []
    for target, source in model.all_tied_weights_keys.items():
        found = [files.find(name, model.base_model_prefix) for name in (target, source)]
        first, second = found
        if first and second and first != second and not files.are_equal(first, second):
            pairs.append((target, source))
    return pairs


def check_shapes(files: WeightFiles, model: Any) -> None:
    """Refuse files whose tensors have other shapes than the configuration gives them.

    Args:
        files, model: as for `find_differing_ties`.

    Raises:
        ValueError: names the first such weight and both shapes.
    """
    for parameter, value in model.named_parameters():
        name = files.find(parameter, model.base_model_prefix)
        if name is not None and files.shapes[name] != tuple(value.shape):
            raise ValueError(
                f"its files hold {name} in the shape {list(files.shapes[name])}, and its "
                f"config.json makes that {list(value.shape)}"
            )
