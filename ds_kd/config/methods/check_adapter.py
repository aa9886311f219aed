"""Check the frozen adapter under which a student's own base teaches it."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from ds_kd.config.components import problem
from ds_kd.config.schema import SHARED_BASE, RunConfig
from ds_kd.errors import first_line
from ds_kd.files import NotPlainFileError, read_plain_file

KEY = "teacher.adapter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_BYTES = 10_000_000


def check_adapter(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` if the teacher's adapter is none, or has no base to lie on."""
    given = cfg.teacher.adapter
    if given is None:
        return
    if cfg.teacher.kind != SHARED_BASE:
        hint = "it lies on the student's own base; another teacher is merged with its adapter first"
        problems.append(problem(KEY, given, f"teacher.kind: {SHARED_BASE} beside it", hint))
    elif reason := _read(Path(given))[1]:
        expected = f"a directory with the {_CONFIG} and {_WEIGHTS} of a LoRA adapter"
        hint = f"{reason}; checkpoints of a run with peft hold one (LATEST/adapter)"
        problems.append(problem(KEY, given, expected, hint))
    elif (cfg.distributed.tp_size or 1) > 1:
        hint = "its matrices are not cut; remove one of the two keys"
        problems.append(problem(KEY, given, "no distributed.tp_size beside it", hint))


def note_on_adapter(cfg: RunConfig) -> list[str]:
    """Return a note on an adapter that was made for a model of another name."""
    if cfg.teacher.adapter is None:
        return []
    base = str(_read(Path(cfg.teacher.adapter))[0].get("base_model_name_or_path") or "")
    own = str(cfg.model.kwargs.get("pretrained_model_name_or_path"))
    if PurePath(base).name in ("", PurePath(own).name):
        return []
    return [f"{KEY}: its file says that it was made for {base}, and the student starts from {own}"]


def _read(directory: Path) -> tuple[dict[str, Any], str]:
    """Return the configuration of an adapter, and what is wrong with it, or an empty text."""
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            return {}, f"it has no {name}"
    try:
        found: Any = json.loads(read_plain_file(directory / _CONFIG, _MAX_BYTES))
    except (OSError, ValueError, NotPlainFileError, RecursionError) as error:
        return {}, f"its {_CONFIG} cannot be read: {first_line(error)}"
    if not isinstance(found, dict):
        return {}, f"its {_CONFIG} holds {type(found).__name__}, not a mapping"

    # The base's own weights, its head among them, are those of the student.
    if found.get("peft_type") != "LORA":
        return found, f"its {_CONFIG} is of type {found.get('peft_type')}, not LORA"
    if found.get("bias", "none") != "none" or found.get("modules_to_save"):
        return found, "it has weights beside those of LoRA (bias or modules_to_save)"
    return found, ""
