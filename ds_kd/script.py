"""End every script with a sentence for its user instead of a traceback, printed once a job."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ds_kd.errors import UserError, explain
from ds_kd.process import check_machine


class Ending:
    """Ends the script whose work is inside its block: `with Ending() as ending: …`.

    One rank prints a `UserError` on standard error. Any other error is a bug and keeps its
    traceback. `code` is the exit code then, 0 without an error.
    """

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.code = 130
        elif isinstance(error, Exception):
            self.code = _tell(error)
        return isinstance(error, (KeyboardInterrupt, Exception))


def run_script(work: Callable[[], int | None]) -> int:
    """Run `work`, and return its exit code or that of the error it raises, as `Ending` tells it."""
    with Ending() as ending:
        check_machine()
        ending.code = work() or 0
    return ending.code


def _tell(error: Exception) -> int:
    """Print an error, on one rank if it is a user's, and return its exit code."""
    told = error if isinstance(error, UserError) else explain(error)
    if told is None:
        traceback.print_exception(error)
        return 1
    if _is_first_to_fail():
        text = told.text(excerpts=sys.stderr.isatty())
        print(f"\n{_name_rank(told)}{text}", file=sys.stderr, flush=True)
    return told.exit_code


def _name_rank(told: UserError) -> str:
    """Return the prefix `rank N: ` for a message of one rank, or an empty text."""
    rank = os.environ.get("RANK", "0")
    # Before the ranks meet, all ranks of a machine report the same problems of the config.
    is_on_first = os.environ.get("LOCAL_RANK") == rank
    if told.is_of_config and is_on_first and "torch" not in sys.modules:
        return ""
    return f"rank {rank}: " if rank.isdigit() and rank != "0" else ""


def _is_first_to_fail() -> bool:
    if "torch" not in sys.modules:  # it takes seconds, and the ranks have not met yet
        from ds_kd.parallel.rendezvous import is_first_here

        return is_first_here()
    from ds_kd.parallel.world import is_first_to_fail

    return is_first_to_fail()
