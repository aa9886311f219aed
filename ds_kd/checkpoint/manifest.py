"""Write and verify a checkpoint's manifest (size and hash of every file), and switch links
atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ds_kd.errors import UserError
from ds_kd.files import parse_json, read_plain_file

MANIFEST, ENGINE, MODEL, ADAPTER = "manifest.json", "engine", "model", "adapter"
STATE, CONFIG, CARD = "state.json", "config.yaml", "README.md"
VALIDATION = "validation.json"  # of a validation that was made after the save; in no manifest
ROLLOUTS = "rollouts.json"
LATEST, FINAL, BEST = "LATEST", "final", "BEST"
_LARGEST = 100_000_000  # bytes of a manifest
#: Errors of the system, torch and safetensors on a full disk.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class CheckpointError(UserError):
    """A checkpoint cannot be used or written; the message names the file and what to do."""


def error_of(function: Callable[[], Any]) -> Exception | None:
    """Call a function that writes files, and return its error, or None."""
    try:
        function()
    except WRITE_ERRORS as error:
        return error
    return None


def digest(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after flushing it to the disk."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}


def files_of(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def write(directory: Path, files: dict[str, Any]) -> None:
    """Write the manifest of a directory.

    Raises:
        OSError: the directory has a file that is not among `files`, as where a rank has looked
            before a network's file system showed it: it would be missed by nobody.
    """
    there = {str(p.relative_to(directory)) for p in files_of(directory) if p.name[0] != "."}
    if forgotten := sorted(there - files.keys()):
        raise OSError(f"{directory / forgotten[0]}: no rank has summed up this file")
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1), "utf-8")
    fsync(directory / MANIFEST)


def read_files_of(checkpoint: Path) -> dict[str, Any]:
    """Return size and hash of every file according to the manifest.

    Raises:
        CheckpointError: the manifest is missing or unreadable.
    """
    try:
        files = parse_json(read_plain_file(checkpoint / MANIFEST, _LARGEST))["files"]
        for name, want in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(name)
            _ = int(want["bytes"]), str(want["sha256"])
        return dict(files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{checkpoint / MANIFEST}: missing or unreadable") from None


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    for name, want in read_files_of(checkpoint).items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != want["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {want['bytes']}")
        if digest(path)["sha256"] != want["sha256"]:
            raise CheckpointError(f"{path}: content does not match its SHA-256")


def follow(link: Path) -> Path:
    """Return where a link leads in the end; the link itself if it leads in a circle."""
    return Path(os.path.realpath(link))


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def switch_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, atomically."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    fsync(link.parent)
