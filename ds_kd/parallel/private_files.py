"""Small files that processes of one user leave each other in the temporary directory, where
everybody may write: in a directory of the user's own, created exclusively, no link followed."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_directory() -> Path | None:
    """Return this user's own directory; None where there is none to be had, because nothing can be
    written or somebody else has made something of its name."""
    path = Path(tempfile.gettempdir()) / f"ds_kd-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return path if is_ours and not found.st_mode & 0o077 else None


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        FileExistsError: something is there, be it a link to nowhere.
        OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "w") as file:
        file.write(text)


def read_own(path: Path) -> tuple[str, float] | None:
    """Return the text of a file of this user's and when it was written (seconds of Unix time);
    None where there is none, or a link, or another's."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                return None
            return file.read(), found.st_mtime
    except OSError:
        return None
