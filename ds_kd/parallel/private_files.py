"""Exchange small files between processes of one user.

Everybody may write into the temporary directory, so the files are in a directory of the user's own;
they are created exclusively, and no link is followed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_directory() -> Path | None:
    """Return this user's own directory, or None if it cannot be made or its name is taken by
    another user."""
    path = Path(tempfile.gettempdir()) / f"ds_kd-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return path if is_ours and not found.st_mode & 0o077 else None


def write_new(path: Path, text: str) -> None:
    """Write a new file.

    Raises:
        FileExistsError: the path exists, as a dangling link does too.
        OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def read_own(path: Path) -> tuple[str, float] | None:
    """Return a file's text and time of change (seconds of Unix time), or None if there is no
    regular file of this user."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, encoding="utf-8", errors="replace") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                return None
            return file.read(), found.st_mtime
    except OSError:
        return None
