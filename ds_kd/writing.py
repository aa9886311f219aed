"""Write files and directories that are whole or absent, whenever the process ends, and clear what
killed ones left.

They are written into a hidden folder beside their place, `.writing-MACHINE-PID-START-…`, and
renamed into place from there. A process that is killed leaves its folder, with whatever a library
has put there. Whoever writes into the directory next removes it: on the same machine once the
process is gone, and on another, where that cannot be told, after a day without a change.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ds_kd.files import name_path
from ds_kd.process import identify_machine, read_start

_NAME = re.compile(r"\.writing-([0-9a-f]{12})-(\d+)-(\d+)-[0-9a-f]{8}")
_STALE_SECONDS = 24 * 3600.0


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield the name under which this block writes a file, and rename it to `path` at the end; if
    the block fails, nothing of it stays.

    Raises:
        OSError: it cannot be written; names a path.
    """
    with _open_folder(path) as folder:
        unfinished = folder / path.name
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


@contextlib.contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """Yield the name under which this block makes a directory, and rename it to `path` at the end,
    where nothing may be; if the block fails, nothing of it stays.

    Raises:
        FileExistsError: something is there by then.
        OSError: it cannot be written; names a path.
    """
    with _open_folder(path) as folder:
        unfinished = folder / path.name
        yield unfinished
        if os.path.lexists(path):  # an empty directory would be replaced
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        unfinished.rename(path)


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder of this process beside a path, which is gone after the block."""
    started = read_start(os.getpid())
    name = f".writing-{_hash_machine()}-{os.getpid()}-{started}-{uuid.uuid4().hex[:8]}"
    folder = path.parent / name
    try:
        with name_path(path):
            folder.mkdir(parents=True)
            remove_leftovers(path.parent)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, whole or not at all.

    Raises:
        OSError: it cannot be written; names a path.
    """
    with write_whole(path) as unfinished:
        unfinished.write_text(text, "utf-8")


def remove_leftovers(directory: Path) -> None:
    """Remove what processes that are gone have left half written in a directory."""
    for name in os.listdir(directory):
        folder, found = directory / name, _NAME.fullmatch(name)
        # It stays where it cannot be looked at or removed; its writer may remove it meanwhile.
        with contextlib.suppress(OSError):
            if found and folder.is_dir() and not folder.is_symlink():
                machine, pid, started = found.groups()
                if _is_gone(folder, machine, int(pid), int(started)):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_gone(folder: Path, machine: str, pid: int, started: int) -> bool:
    if machine == _hash_machine():
        found = read_start(pid)
        return found != started if found is not None else not _is_hidden(pid)
    changed = max(each.lstat().st_mtime for each in (folder, *folder.rglob("*")))
    return time.time() - changed > _STALE_SECONDS


def _is_hidden(pid: int) -> bool:
    """Return whether a process is another user's, of which a system may tell nothing."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _hash_machine() -> str:
    return hashlib.sha256("\n".join(identify_machine()).encode()).hexdigest()[:12]
