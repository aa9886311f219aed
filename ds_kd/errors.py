"""Errors that a user reads."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FRAMES = 3  # lines of a user's code that a message names


class UserError(Exception):
    """An error whose message is for the user: scripts print it without a traceback.

    Everything else that reaches the top of a script is a bug and keeps its traceback.
    """

    exit_code = 1
    #: True if it is about the YAML and its overrides, which all ranks read.
    is_of_config = False

    def text(self, excerpts: bool = False) -> str:
        """Return the message.

        Args:
            excerpts: add the lines of the file that it is about.
        """
        return str(self)


class MachineError(UserError):
    """A run cannot start because of an environment variable, a limit of the shell, the working
    directory, or the network between ranks."""

    exit_code = 2


class TrainingError(UserError):
    """The run cannot go on; the message says why and names the samples."""


class OwnCodeError(TrainingError, ValueError):
    """Code of the user's own fails; the message names its lines."""


#: Words with which the system, torch and CUDA report that memory, files or threads are used up.
_EXHAUSTED = {
    "memory": ("out of memory", "allocate memory", "failed to map segment", "MemoryError"),
    "open files (ulimit -n)": ("Too many open files",),
    "room on a disk": ("No space left on device", "Disk quota exceeded", "File too large"),
    "threads or processes (ulimit -u)": ("can't start new thread", "temporarily unavailable"),
}


#: Words of torch's data loader, and what to do.
_WORKERS = {
    "DataLoader worker (pid": (
        "Workers that are killed have often used up the memory: lower dataloader.num_workers (0 "
        "loads data in the rank itself) or dataloader.prefetch_factor"
    ),
    "DataLoader timed out": (
        "A worker is stuck in the data set or the collate_fn: dataloader.num_workers=0 shows where "
        "(Ctrl-C twice); a slow one needs a larger dataloader.timeout (seconds)"
    ),
}


def explain(error: BaseException) -> UserError | None:
    """Return the message for an error that means that a resource of the machine is used up, that a
    path is none, or that a loader's worker has ended, or None for any other error."""
    text = f"{type(error).__name__}: {error}"
    for words, remedy in _WORKERS.items():
        if words in text:
            return UserError(f"{first_line(error)}\n{remedy}")
    if "File name too long" in text or "embedded null" in text:
        return MachineError(f"a name is no path of this machine: {first_line(error):.200}")
    for what, several in _EXHAUSTED.items():
        if any(words in text for words in several):
            told = f"no more {what}: {first_line(error)}"
            if what == "memory":
                told += (
                    "\nLower step_scheduler.local_batch_size, set "
                    "distributed.activation_checkpointing: true, use more ranks or the offload "
                    "files in ds_configs/zero/; ulimit -v and a container's limit count too"
                )
            return UserError(told)
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_user_error(error: BaseException) -> str:
    """Return an error of a user's own code in one line: its kind, its text, and the lines of that
    code that led to it, the last one first. Lines of this package and of libraries are left out."""
    told = error.msg if isinstance(error, SyntaxError) else error
    text = " ".join(f"{type(error).__name__}: {told}".split()).removesuffix(": ")
    places = _list_own_places(error)[-_FRAMES:]
    return f"{text} ({', called at '.join(reversed(places))})" if places else text


def is_of_own_code(error: BaseException) -> bool:
    """Return whether lines of a user's own code led to an error that is one of that code: it tells
    of no memory, say, that is used up."""
    return explain(error) is None and bool(_list_own_places(error))


@contextmanager
def name_own_code(place: str) -> Iterator[None]:
    """Turn an error of a user's own code that this block calls into one that names its lines; any
    other error is as it was.

    Args:
        place: the beginning of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_of_own_code(error):
            raise
        raise OwnCodeError(f"{place}: {describe_user_error(error)}") from error


def _list_own_places(error: BaseException) -> list[str]:
    """Return the lines of a user's own code that led to an error, the last one last."""
    ours = (f"{Path(__file__).parent}/", f"{sysconfig.get_path('stdlib')}/", "<")
    started = getattr(sys.modules.get("__main__"), "__file__", None)
    places = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours)
        and not {"site-packages", "dist-packages"} & {*Path(frame.filename).parts}
        # The script that was started is no code of the user's.
        and not (frame.name == "<module>" and frame.filename == started)
    ]
    if isinstance(error, SyntaxError) and error.filename is not None:
        places.append(f"{error.filename}:{error.lineno}")
    return places
