"""Check the files that a config names before a run starts, without heavy imports."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ds_kd.config.checks.weights import find_wrong_files
from ds_kd.config.components import problem
from ds_kd.files import find_wrong_size


def check_model(key: str, kwargs: dict[str, Any], config_only: bool = False) -> str | None:
    """Return the problem of the model that `from_pretrained` arguments name, or None. A hub id is
    not looked up.

    Args:
        key: the name of the section.
        config_only: a config.json is enough; tokenizer and weights are not looked for.
    """
    key, name = f"{key}.pretrained_model_name_or_path", kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or not name:
        return problem(key, name, "a directory or a hub id")
    if is_directory(name):
        directory = Path(name) / str(kwargs.get("subfolder", ""))
        if lacking := _find_missing_file(directory, kwargs, config_only):
            hint = "save the model and its tokenizer there with save_pretrained"
            return problem(key, name, f"a directory with {lacking}", hint)
        if wrong := find_wrong_size(name, str(kwargs.get("subfolder", ""))):
            return problem(key, name, "a directory with a language model", wrong)
        if config_only or kwargs.get("gguf_file") is not None:
            return None
        wrong = find_wrong_files(directory, kwargs)
        return (
            problem(key, name, "a directory with a whole language model", wrong) if wrong else None
        )
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
    """Return the file that a model's directory lacks, or None."""
    if kwargs.get("gguf_file") is not None:
        return None if _is_file(directory / str(kwargs["gguf_file"])) else "that gguf_file"
    if not _is_file(directory / "config.json"):
        return "a config.json"
    if config_only:
        return None
    tokenizers = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return None if any(_is_file(directory / name) for name in tokenizers) else "a tokenizer"


#: The form of a hub id; a path may hold other characters.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
#: First parts of paths that are no user or organisation of the hub.
_DIRECTORIES = ("checkpoint", "checkpoints", "ckpt", "models", "output", "outputs")


def looks_local(name: str) -> bool:
    """Return whether a name means a local path: it is no hub id, or a directory here is near."""
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
    """Return a note on a name that is looked up on the hub though a path may be meant, or None."""
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


#: Attention → the package that it needs, and one that can replace it.
_PACKAGES = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}


def find_missing_package(key: str, kwargs: dict[str, Any]) -> str | None:
    """Return the problem of an `attn_implementation` whose package is not installed, or None."""
    name = kwargs.get("attn_implementation")
    packages = _PACKAGES.get(name, ()) if isinstance(name, str) else ()
    if not packages or any(importlib.util.find_spec(package) for package in packages):
        return None
    return (
        f"{key}.attn_implementation: {name} needs the package {packages[0]}, which is not "
        f"installed here; install it, or write sdpa"
    )


def _is_misspelt(name: str, directory: Path) -> bool:
    """Return whether `directory` holds almost this name. Other digits mean another model."""
    near = _find_near_names(name, directory)
    return any(re.sub(r"\D", "", found) == re.sub(r"\D", "", name) for found in near)


def _find_near_names(name: str, directory: Path) -> list[str]:
    """Return the entries of `directory` that almost have this name."""
    try:
        return difflib.get_close_matches(name, os.listdir(directory), n=3, cutoff=0.8)
    except (OSError, ValueError):
        return []


def check_directory(key: str, name: str) -> str | None:
    """Return why a run could not write into a directory, or None. Creates nothing."""
    path = Path(name).absolute()
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return problem(key, name, "the path of a directory")
    if not there.is_dir():
        return problem(key, name, "a directory", f"{there} is a file")
    if any(there.resolve().is_relative_to(root) for root in ("/proc", "/sys")):
        return problem(key, name, "a directory that can be written", f"{there} is the kernel's own")
    if there == Path(there.anchor):  # it may exist on the machine of the run
        return None
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(key, name, "a directory that can be written", f"{there} cannot")
    return None


def has_gpu() -> bool:
    """Return whether this machine has a device file of an NVIDIA or AMD accelerator."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
