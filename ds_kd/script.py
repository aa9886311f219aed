"""End every script with a sentence for its user instead of a traceback, printed once a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ds_kd.errors import UserError, describe_exhaustion
from ds_kd.process import check_machine


def run_script(work: Callable[[], int | None]) -> int:
    """Run `work` and return the exit code: its own, or that of the `UserError` it ends in, which is
    printed on standard error by one rank. Every other error is a bug and keeps its traceback.
    """
    try:
        check_machine()
        return work() or 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        told = error
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        lacking = describe_exhaustion(error)
        if lacking is None:
            raise
        told = lacking
    if _is_first_to_fail():
        rank = os.environ.get("RANK", "0")
        where = f"rank {rank}: " if rank.isdigit() and rank != "0" else ""
        text = told.text(excerpts=sys.stderr.isatty())
        print(f"\n{where}{text}", file=sys.stderr, flush=True)
    return told.exit_code


def _is_first_to_fail() -> bool:
    if "torch" not in sys.modules:  # it takes seconds, and the ranks have not met yet
        from ds_kd.parallel.rendezvous import is_first_here

        return is_first_here()
    from ds_kd.parallel.world import is_first_to_fail

    return is_first_to_fail()
