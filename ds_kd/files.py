"""Read files that a user names, whatever they are, and tell what no file of its kind holds."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MAX_BYTES = 100_000_000


class NotPlainFileError(ValueError):
    """A path names a device, a pipe, a directory, or a file that is too large."""


def read_plain_file(path: str | Path, most: int) -> bytes:
    """Return the bytes of a regular file, without waiting for a pipe.

    Args:
        most: largest size in bytes.

    Raises:
        OSError: the file cannot be read.
        NotPlainFileError: it is not a regular file, or is larger.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotPlainFileError("not a regular file")
    with open(handle, "rb") as file:
        content = file.read(most + 1)
    if content is None:  # a file of the kernel that has no content yet
        raise NotPlainFileError("not a regular file")
    if len(content) > most:
        size = f"{most // 1024} KiB" if most < 1_000_000 else f"{most // 1_000_000} MB"
        raise NotPlainFileError(f"larger than {size}")
    return content


@contextmanager
def name_path(path: Path) -> Iterator[None]:
    """Have an error of the system in this block name the path; that of a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of anything but a file: a pipe would be waited for, and a
    device or link be gone.

    Raises:
        OSError: says what is there.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a directory; give the name of a file")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError("it is no regular file; give the name of one")


def give_usual_mode(path: Path) -> None:
    """Give a file of weights, or all in a directory, the mode that the process gives any new file:
    safetensors lets their owner alone read them."""
    mask = os.umask(0o022)  # which can only be read by setting it
    os.umask(mask)
    for file in path.glob("*.safetensors") if path.is_dir() else (path,):
        file.chmod(0o666 & ~mask)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, is not UTF-8, or is nested more deeply than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


#: Sizes in a config.json, and the largest that a model may have; building more would never end.
_LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 1_000_000, "vocab_size": 100_000_000,
    "num_attention_heads": 100_000, "intermediate_size": 10_000_000,
}  # fmt: skip


def find_wrong_size(name: str, subfolder: str = "") -> str:
    """Return which size of a local model's config.json no model has, or an empty text."""
    try:
        config = json.loads(read_plain_file(Path(name, subfolder, "config.json"), _MAX_BYTES))
    except (OSError, ValueError, RecursionError):  # told by whoever needs the file
        return ""
    for key, most in _LARGEST.items() if isinstance(config, dict) else ():
        value = config.get(key)
        if isinstance(value, int) and not 0 < value <= most:
            return f"its config.json has {key} {value!s:.20}, expected a number from 1 to {most}"
    return ""
