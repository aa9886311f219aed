"""The files a config names, looked at before anything starts and without a heavy import."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ds_kd.config.components import problem


def check_model(key: str, kwargs: dict[str, Any], config_only: bool = False) -> str | None:
    """What is wrong with the model that `from_pretrained` arguments name; a hub id is believed.

    Args:
        key: of the section.
        config_only: a config.json is enough; neither tokenizer nor weights are looked for.
    """
    key, name = f"{key}.pretrained_model_name_or_path", kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or not name:
        return problem(key, name, "a directory or a hub id")
    if is_directory(name):
        lacking = _find_missing_file(
            Path(name) / str(kwargs.get("subfolder", "")), kwargs, config_only
        )
        hint = "save the model and its tokenizer there with save_pretrained"
        return problem(key, name, f"a directory with {lacking}", hint) if lacking else None
    if looks_local(name):
        return problem(key, name, "a directory that exists, or a hub id")
    return None


def is_directory(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _find_missing_file(directory: Path, kwargs: dict[str, Any], config_only: bool) -> str | None:
    """What a model's directory must hold and does not."""
    if kwargs.get("gguf_file") is not None:
        return None if _is_file(directory / str(kwargs["gguf_file"])) else "that gguf_file"
    if not _is_file(directory / "config.json"):
        return "a config.json"
    if config_only:
        return None
    tokenizers = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return None if any(_is_file(directory / name) for name in tokenizers) else "a tokenizer"


#: Of a hub id; a path may hold more.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
#: First parts that name a directory of somebody's, and nobody's on the hub.
_DIRECTORIES = ("checkpoint", "checkpoints", "ckpt", "models", "output", "outputs")


def looks_local(name: str) -> bool:
    """Whether no hub id is meant: no such id can be, or a directory of this machine is near."""
    if not _HUB_ID.fullmatch(name):
        return True
    first, slash, second = name.partition("/")
    if not slash:
        return _is_misspelt(first, Path())
    if first in _DIRECTORIES or _is_misspelt(second, Path(first)):
        return True
    near = [] if Path(first).is_dir() else _find_near_names(first, Path())
    return any(is_directory(str(Path(found, second))) for found in near)


def note_on_model(key: str, kwargs: dict[str, Any]) -> str | None:
    """Return what to say of a name that will be asked of the hub though a path may be meant."""
    name = kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or "/" not in name or is_directory(name):
        return None
    first, _, second = name.partition("/")
    if not is_directory(first):
        return None
    return (
        f"{key}.pretrained_model_name_or_path: the directory {first} holds no {second}; the hub is "
        f"asked for {name}"
    )


#: Attention by the package that it needs, and one that can stand in for it.
_PACKAGES = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}


def find_missing_package(key: str, kwargs: dict[str, Any]) -> str | None:
    """Return which package a model's `attn_implementation` needs and this machine lacks."""
    name = kwargs.get("attn_implementation")
    packages = _PACKAGES.get(name, ()) if isinstance(name, str) else ()
    if not packages or any(importlib.util.find_spec(package) for package in packages):
        return None
    return (
        f"{key}.attn_implementation: {name} needs the package {packages[0]}, which is not "
        f"installed here; install it, or write sdpa"
    )


def _is_misspelt(name: str, directory: Path) -> bool:
    """Whether `directory` holds almost this name; with other digits it is another model."""
    near = _find_near_names(name, directory)
    return any(re.sub(r"\D", "", found) == re.sub(r"\D", "", name) for found in near)


def _find_near_names(name: str, directory: Path) -> list[str]:
    """The entries of `directory` that almost have this name."""
    try:
        return difflib.get_close_matches(name, os.listdir(directory), n=3, cutoff=0.8)
    except (OSError, ValueError):
        return []


def check_directory(key: str, name: str) -> str | None:
    """What is in the way of a directory that a run will write; makes nothing."""
    path = Path(name).absolute()
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return problem(key, name, "the path of a directory")
    if not there.is_dir():
        return problem(key, name, "a directory", f"{there} is a file")
    if there == Path(there.anchor):  # of another machine, perhaps; there the run will tell
        return None
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(key, name, "a directory that can be written", f"{there} cannot")
    return None


def has_gpu() -> bool:
    """Whether this machine shows an accelerator of NVIDIA's or AMD's to its processes."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
