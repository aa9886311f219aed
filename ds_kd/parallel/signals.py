"""Requests to stop a run: SIGTERM (`scancel`, a preempted node), SIGUSR1 (`sbatch --signal`),
SIGINT (Ctrl-C) and SIGHUP (a closed terminal)."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any

#: Set for the commands of `StoppableCommands`.
SENT_ON = "DS_KD_SENT_ON"
#: Variables that the `deepspeed` launcher, torchrun and a sweep set. A signal to the process group
#: reaches them too, and they pass it on, so each rank gets it twice, or SIGTERM after SIGINT.
_PASSED_ON_BY = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", SENT_ON)
_ECHO_SECONDS = 3.0
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A flag that a signal sets; calling the object returns whether this process was asked to stop.

    The trainer reads the flag between steps. A second signal ends the process at once, with the
    exit code of a process that the signal killed; a signal that the launcher passes on within
    seconds of the first is not a second one. Before the flag is first read there is nothing to
    save, and Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._is_looked_at = False

    def __call__(self) -> bool:
        self._is_looked_at = True
        return self.received is not None

    def listen(self) -> None:
        """Handle the signals from now on (call it in the main thread). Under nohup SIGHUP stays
        ignored."""
        for number in _REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if not self._is_echo():
                os._exit(128 + number)
            return
        if number == signal.SIGINT and not self._is_looked_at:
            os._exit(128 + number)
        self.received, self._since = number, time.monotonic()

    def _is_echo(self) -> bool:
        launched = any(name in os.environ for name in _PASSED_ON_BY)
        return launched and time.monotonic() - self._since < _ECHO_SECONDS


class StoppableCommands:
    """Runs commands one after another, and hands requests to stop on to the one that runs.

    A terminal sends Ctrl-C to that process itself. Any other request may have reached this process
    alone and is handed on as SIGTERM, as torchrun dies of some others. The variable `SENT_ON` keeps
    a rank that got it too from taking this for a second request. `is_asked` tells of any.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._child: subprocess.Popen | None = None
        for number in _REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hand_on)

    def run(self, command: list[str]) -> int:
        """Return the exit code of a command; that of a process that a signal killed is 128 and
        the signal's number, as in a shell."""
        self._child = subprocess.Popen(command, env={**os.environ, SENT_ON: "1"})
        if self.is_asked:  # while it was being started
            self._child.terminate()
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _hand_on(self, number: int, frame: Any) -> None:
        self.is_asked = True
        if self._child is not None and number != signal.SIGINT:
            self._child.terminate()


def prepare_worker(worker: int) -> None:
    """Make a loader's worker process ignore requests to stop, and end quietly after its rank.

    Terminals and schedulers signal every process of a job, and a rank that ends its step may still
    need batches. `end_workers_at_exit` ends the worker. A rank that was killed while it fetched a
    batch leaves a broken connection, which is no error of the worker's.
    """
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = functools.partial(_ignore_broken_connection, sys.excepthook)


def _ignore_broken_connection(
    otherwise: Any, kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    if not isinstance(error, (ConnectionError, EOFError)):
        otherwise(kind, error, trace)


@functools.cache
def end_workers_at_exit() -> None:
    """Kill this process's loader workers when it exits.

    Python asks them to end by SIGTERM, which `prepare_worker` makes them ignore, and then waits:
    one that is stuck in a user's data set would keep the rank alive.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for one that was killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
