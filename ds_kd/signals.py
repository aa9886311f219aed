"""A request to stop, as schedulers send it: SIGTERM (`scancel`, a preempted node) or SIGUSR1
(`sbatch --signal`)."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopRequest:
    """Calling it tells whether this process was asked to stop.

    The first signal only sets a flag, which the trainer looks at between steps; the second ends the
    process at once, with the exit code of a process that the signal killed.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def listen(self) -> None:
        """From now on; in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        # A scheduler signals every process of the job. Loader workers die of it, and torch would
        # raise in the middle of a step for batches that nobody will ask for.
        # Not SIG_DFL: Python complains of one that is already on its way.
        signal.signal(signal.SIGCHLD, lambda *_: None)
