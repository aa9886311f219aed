"""Lock a checkpoint directory for one run, by a file that names the process.

The file is created atomically (by a hard link), and its holder refreshes its time of change every
few seconds. A holder on the same machine is alive if its process exists, so a run can start
directly after another was killed. A holder on another machine is alive if the time of change
advances, and is taken for dead after `STALE_SECONDS`. Times are compared with that of a file
written just now, so that only the clock of the file system counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_kd.files import parse_json, read_plain_file
from ds_kd.process import identify_machine, read_start

NAME = "RUNNING"
_LARGEST = 1 << 16  # bytes of a lock file
HEARTBEAT_SECONDS = 6.0
STALE_SECONDS = 10 * HEARTBEAT_SECONDS


class DirectoryInUse(ValueError):
    """Another run uses the directory; the message names its host and process."""


class RunLock:
    """An exclusive lock of a checkpoint directory, from `take` to `release`.

    Args:
        directory: an existing directory.
        heartbeat: seconds between two refreshes of the file.
        stale: seconds without a refresh after which a holder on another machine is taken for dead.
    """

    def __init__(
        self,
        directory: Path,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ):
        self.path = directory / NAME
        self.heartbeat, self.stale = heartbeat, stale
        self._token = uuid.uuid4().hex
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock; if another machine holds it, wait until its holder refreshes it or is
        stale.

        Raises:
            DirectoryInUse: another run is alive.
            OSError: the directory cannot be written.
        """
        seen: float | None = None  # time of change of the file of a holder on another machine
        while True:
            with _one_at_a_time(self.path):
                holder = _read(self.path)
                if holder is None or self._is_gone(holder):
                    self.path.unlink(missing_ok=True)
                    if self._create():
                        break
                    continue  # on a file system without locks another run was faster
            if _is_here(holder) or (seen is not None and holder["beat"] != seen):
                raise DirectoryInUse(_refusal(holder))
            seen = holder["beat"]
            time.sleep(min(1.0, self.heartbeat / 2))
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this run still has the lock, which it loses if it stands still for `stale`
        seconds.

        Raises:
            DirectoryInUse: another run has it; names its host and process.
        """
        holder = _read(self.path)
        if holder is not None and holder.get("token") != self._token:
            raise DirectoryInUse(_refusal(holder))

    def release(self) -> None:
        """Release the lock, if it was taken."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):  # an error here must not hide the run's own
            if self._is_ours():
                self.path.unlink()

    def _create(self) -> bool:
        """Create the lock file atomically, and return False if there is one."""
        aside = self.path.with_name(f".{NAME}.{self._token}")
        aside.write_text(json.dumps({"token": self._token, **_this_process()}), "utf-8")
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with open(handle, "w", encoding="utf-8") as file:
                file.write(aside.read_text("utf-8"))
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        if _is_here(holder):
            return not _lives(holder)
        return self._now() - holder["beat"] > self.stale

    def _now(self) -> float:
        """Return the present time of the file system's clock."""
        probe = self.path.with_name(f".{NAME}.{self._token}")
        probe.write_text("", "utf-8")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _is_ours(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.get("token") == self._token

    def _beat(self) -> None:
        while not self._over.wait(self.heartbeat):
            with contextlib.suppress(OSError):  # a network file system may be away for a while
                if self._is_ours():
                    os.utime(self.path)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Keep two starting runs from examining one stale file at the same time, if the file system has
    locks. A lock ends with its process."""
    guard = os.open(path.with_name(f".{NAME}.guard"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a lock file and its time of change (`beat`), or None without one."""
    holder: Any = None
    try:
        with contextlib.suppress(ValueError):  # no lock file of a run
            # Opening makes a network file system refresh the file's state.
            holder = parse_json(read_plain_file(path, _LARGEST))
        beat = path.lstat().st_mtime
    except FileNotFoundError:
        return None
    return {**(holder if isinstance(holder, dict) else {}), "beat": beat}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": identify_machine(),
        "pid": os.getpid(),
        "process_started": read_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == identify_machine()


def _lives(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    started = read_start(pid) if isinstance(pid, int) else None
    return started is not None and started == holder.get("process_started")


def _refusal(holder: dict[str, Any]) -> str:
    host, pid = holder.get("host", "an unknown host"), holder.get("pid", "unknown")
    return (
        f"another run has had it since {holder.get('since', 'a while')}: process {pid} on {host}; "
        f"give this run another directory, or end that one first (kill {pid} on {host})"
    )
