"""Identify the files of a model without reading them whole, to notice that a directory's weights
were replaced between a checkpoint and its resume."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

#: The end of the names of these entries in a run's fingerprint.
FILES = " files"

_KINDS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_BLOCK = 1 << 20
_SAMPLES = 8


def identity_of(name: str, options: dict[str, Any]) -> str | None:
    """Return a text that changes if the model is replaced, or None if there is none.

    For a directory it is made of the sizes of its config and weight files and a hash of blocks
    spread over each file, as files of one architecture have the same size and header. For a hub
    model it is the commit.

    Args:
        name: a directory, or a hub id whose files have been downloaded.
        options: `revision`, `cache_dir` and `subfolder` of from_pretrained, if given.
    """
    directory = Path(name) / options.get("subfolder", "")
    if directory.is_dir():
        return _of_directory(directory)
    from huggingface_hub import try_to_load_from_cache

    file = "/".join(filter(None, (options.get("subfolder"), "config.json")))
    try:
        found = try_to_load_from_cache(
            name, file, cache_dir=options.get("cache_dir"), revision=options.get("revision")
        )
    except ValueError:  # no name of a hub
        return None
    if not isinstance(found, str):
        return None
    parts = Path(found).parts
    return f"commit {parts[parts.index('snapshots') + 1]}" if "snapshots" in parts else None


def _of_directory(directory: Path) -> str | None:
    files = [directory / "config.json"]
    files += sorted(path for path in directory.iterdir() if path.suffix in _KINDS)
    sha, total = hashlib.sha256(), 0
    try:
        for path in files:
            size = path.stat().st_size if path.is_file() else 0
            sha.update(f"{path.name} {size} ".encode())
            total += size
            if size:
                _add_blocks(sha, path, size)
    except OSError:
        return None
    return f"{total} bytes, {sha.hexdigest()[:12]}"


def _add_blocks(sha: Any, path: Path, size: int) -> None:
    """Hash blocks spread from a file's beginning to its end, or the whole of a small file."""
    last = max(size - _BLOCK, 0)
    places = [*range(0, min(size, _SAMPLES * _BLOCK), _BLOCK)]
    if size > _SAMPLES * _BLOCK:
        places = [last * k // (_SAMPLES - 1) for k in range(_SAMPLES)]
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            sha.update(file.read(_BLOCK))


def explain_no_tokenizer(name: str) -> str:
    """Return why no tokenizer can be loaded from a directory; nothing for what may be a hub id, or
    if its files are there."""
    path = Path(name)
    if path.is_file():
        return "it is a file; give the directory that it lies in"
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
            return "no tokenizer is there; copy the files tokenizer* of the model it comes from"
        return ""
    is_path = path.is_absolute() or str(path).startswith(".") or len(path.parts) > 2
    return "no such directory" if is_path else ""
