"""A request to stop: SIGTERM (`scancel`, a preempted node), SIGUSR1 (`sbatch --signal`), SIGINT
(Ctrl-C) or SIGHUP (a terminal that is gone)."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import time
from typing import Any

#: Set by the `deepspeed` launcher and by torchrun. A signal to the process group reaches them too,
#: and they pass it on: each rank gets it twice, or SIGTERM after SIGINT.
_PASSED_ON_BY = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")
_ECHO_SECONDS = 3.0
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Calling it tells whether this process was asked to stop.

    The first signal only sets a flag, which the trainer looks at between steps; the second ends the
    process at once, with the exit code of a process that the signal killed. What a launcher passes
    on right after the first is the same request. Ctrl-C ends it at once also while nobody has
    looked yet: there is nothing to save before the first step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._is_looked_at = False

    def __call__(self) -> bool:
        self._is_looked_at = True
        return self.received is not None

    def listen(self) -> None:
        """From now on; in the main thread. Under nohup the terminal's end is no request."""
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


def ignore_requests(worker: int) -> None:
    """Let a loader worker live on: terminals and schedulers signal every process of a job, and the
    rank that is about to end its step may still need a batch. `end_workers_at_exit` ends it."""
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def end_workers_at_exit() -> None:
    """Kill this process's loader workers when it exits.

    Python asks them to end by SIGTERM, which `ignore_requests` makes them ignore, and then waits:
    one that is stuck in a user's data set would keep the rank for ever.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for one that was killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
