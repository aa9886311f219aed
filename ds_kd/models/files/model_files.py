"""Identify the files of a model without reading them whole, to notice that a directory's weights
were replaced: between a checkpoint and its resume, or between two evaluations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

#: The end of the names of these entries in a run's fingerprint.
FILES = " weights"
#: That of earlier versions, which looked at fewer places and found other texts.
EARLIER_FILES = " files"

_KINDS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_BLOCK = 4 << 10  # bytes that are read at a place
_SPREAD = 1 << 20  # bytes from one place to the next in a file that does not tell its tensors


def identity_of(name: str, options: dict[str, Any]) -> str | None:
    """Return a text that changes if the model is replaced, or None if there is none.

    For a directory it is made of the sizes of its config and weight files and a hash of blocks of
    every tensor, as files of one architecture have the same size and header, and fine-tuning may
    change a few tensors alone. For a hub model it is the commit.

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
    """Hash the header of a file, and the beginning, middle and end of each of its tensors; of a
    file of another kind than safetensors, blocks from its beginning to its end."""
    with path.open("rb") as file:
        for place in _find_places(file, path, size):
            file.seek(place)
            sha.update(file.read(_BLOCK))


def _find_places(file: BinaryIO, path: Path, size: int) -> list[int]:
    """Return the places of a file at which blocks are read."""
    spread = [*range(0, size, _SPREAD), max(size - _BLOCK, 0)]
    if path.suffix != ".safetensors":
        return spread
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, size)))
        ends = [part["data_offsets"] for name, part in header.items() if name != "__metadata__"]
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # damaged: loading it says so
        return spread

    # The header itself is read whole, as it names the tensors.
    start = 8 + length
    places = [*range(0, start, _BLOCK)]
    for begin, end in sorted(ends):
        last = max(begin, end - _BLOCK)
        places += [start + begin, start + (begin + last) // 2, start + last]
    return places


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
