"""Prepare and check the process that a shell or launcher has started: output, limits, directory,
accelerator.

Every script calls `prepare` first, which repairs what it can. `check_machine` refuses the rest in
one sentence before a library fails on it minutes later. Neither imports torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TextIO

from ds_kd.errors import MachineError

_WANTED_FILES = 4096
_PF_EXITING = 0x4  # one of the kernel's flags of a process
#: The least that a rank needs, measured with `ulimit`; the libraries take most of it.
_LEAST_FILES = 128
_LEAST_ADDRESSES = 4 << 30
#: There where NVIDIA's driver is loaded.
_NVIDIA = Path("/dev/nvidiactl")


class _LastingOutput(io.RawIOBase):
    """A file descriptor that ignores failed writes (`| head`, a closed terminal, a full disk).

    The run goes on without this output, as its metrics are also in a file.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        with contextlib.suppress(OSError):
            return os.write(self._descriptor, data)
        return len(data)


def prepare() -> None:
    """Make printing never fail, and let Ctrl-C end the process without a traceback until a run
    handles it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, so the next opened file would get its number and its output
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            os.set_inheritable(descriptor, True)
    sys.stdout = _make_lasting(sys.stdout, 1)
    sys.stderr = _make_lasting(sys.stderr, 2)
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.simplefilter("default")  # with -W error, warnings of libraries are shown only


def _make_lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a text stream on `descriptor` in the encoding of `stream`; characters that it lacks (α
    on an ASCII terminal) are written as escapes."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingOutput(descriptor)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def check_machine() -> None:
    """Refuse an environment in which no run could work, and raise a low limit of open files.

    Raises:
        MachineError: says what to type.
    """
    try:
        os.getcwd()
    except OSError:
        raise MachineError("the working directory is gone; cd into one that exists") from None
    if sys.flags.optimize > 1:
        raise MachineError(
            "python -OO takes away the docstrings, which transformers reads; start it without, and "
            "unset PYTHONOPTIMIZE"
        )
    accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
    if accelerator not in ("cpu", "cuda"):
        raise MachineError(
            f"DS_ACCELERATOR: got {accelerator!r}, expected cuda or cpu; unset it, and what the "
            f"machine has is found out"
        )
    _check_limits()


def _check_limits() -> None:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _WANTED_FILES:
        files = _WANTED_FILES if most == resource.RLIM_INFINITY else min(_WANTED_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    if files < _LEAST_FILES:
        raise MachineError(
            f"ulimit -n: got {files}, expected {_LEAST_FILES} open files at the least; type "
            f"ulimit -n {_WANTED_FILES}, or have the limit of this machine raised"
        )
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY and addresses < _LEAST_ADDRESSES:
        raise MachineError(
            f"ulimit -v: got {addresses >> 10}, expected {_LEAST_ADDRESSES >> 10} KiB of addresses "
            f"at the least; type ulimit -v unlimited"
        )


def check_caches() -> None:
    """Refuse a cache of Hugging Face's `datasets` that cannot be written. All rows pass through it,
    and the library would blame the rows.

    Raises:
        MachineError: says what to set.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = os.path.abspath(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets")
    there = Path(cache)
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(
            f"{cache}: cannot be written, and rows are kept there as they are read; set HF_HOME "
            f"(or HF_DATASETS_CACHE) to a directory of yours"
        )


def choose_accelerator() -> None:
    """Set DeepSpeed's accelerator, so that it does not search for one and print messages.

    Raises:
        MachineError: `DS_ACCELERATOR` asks for CUDA, and there is none; or it is not set, and torch
            cannot use this machine's GPU.
    """
    import torch

    if torch.cuda.is_available():
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if "DS_ACCELERATOR" not in os.environ and _NVIDIA.exists() and not hidden:
        # A run would take weeks in place of hours, and say so in one word of its first line.
        raise MachineError(_explain_unused_gpu(torch))
    if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cuda":
        raise MachineError(
            "DS_ACCELERATOR is cuda, and torch finds no GPU here (nvidia-smi shows whether the "
            "machine has one; a CPU build of torch sees none); unset it to run on the CPU"
        )


def _explain_unused_gpu(torch: ModuleType) -> str:
    if torch.version.cuda is None:
        why = (
            f"torch {torch.__version__} is a build without CUDA: bash launch/setup.sh on this "
            f"machine installs one with it"
        )
    else:
        why = (
            "torch finds none: nvidia-smi shows whether the driver is too old, and a SLURM job "
            "gets GPUs by --gpus-per-node"
        )
    return f"this machine has an NVIDIA GPU, and {why}; DS_ACCELERATOR=cpu uses the CPU instead"


def identify_machine() -> list[str]:
    """Return the identity of host, boot and container, inside which process numbers are unique."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")]


def read_start(pid: int) -> int | None:
    """Return the start of a process in the kernel's ticks, or None for one that has ended or is
    ending."""
    try:
        # The process's name, in brackets, may hold any character.
        words = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, flags, started = words[0], int(words[6]), int(words[19])
    return None if state in "ZX" or flags & _PF_EXITING else started
