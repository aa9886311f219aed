"""Progress of an evaluation on standard error, with the time left."""

from __future__ import annotations

import sys
import time

_EVERY_SECONDS = 10.0  # in a log; a terminal's line is written anew each time


class Progress:
    """Prints how many samples are done.

    Args:
        title: the beginning of the line.
        total: number of samples.
        done: of them, how many an earlier evaluation has done.
        is_shown: whether this rank prints.
    """

    def __init__(self, title: str, total: int, done: int, is_shown: bool = True):
        self.title, self.total, self.done, self.is_shown = title, total, done, is_shown
        self._before, self._started = done, time.monotonic()
        self._last = self._started
        self._is_terminal = sys.stderr.isatty()

    def advance(self, samples: int) -> None:
        """Count samples, and print if it is time to."""
        self.done = min(self.total, self.done + samples)
        now = time.monotonic()
        is_over = self.done == self.total
        if not self.is_shown or not (
            self._is_terminal or is_over or now - self._last >= _EVERY_SECONDS
        ):
            return
        self._last = now
        line = f"{self.title}: {self.done}/{self.total} samples  {self._tell_time(now)}"
        end = "\n" if is_over or not self._is_terminal else ""
        start = "\r\033[K" if self._is_terminal else ""
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def _tell_time(self, now: float) -> str:
        seconds = now - self._started
        if self.done == self.total:
            return f"took {format_seconds(seconds)}"
        rate = seconds / max(1, self.done - self._before)
        return f"left {format_seconds(rate * (self.total - self.done))}"


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
