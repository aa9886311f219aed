"""Let the ranks of a job meet at one address and port, whichever launcher started them.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. `srun` sets SLURM_*, which
DeepSpeed does not read. Plain `python` sets nothing and starts a single rank. Only `job_of` reads
and checks these variables; code that runs later finds all of them set and valid.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_kd.errors import MachineError, first_line
from ds_kd.parallel.private_files import private_directory, read_own, write_new

_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = (
    "deepspeed, torchrun and srun set all of these; for a single rank on this machine unset them "
    "(env -u RANK -u WORLD_SIZE -u SLURM_NTASKS …)"
)


def _first_slurm_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list: `gpu[03-05,9],cpu1` → `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodelist)
    if match is None:
        raise MachineError(f"SLURM_JOB_NODELIST: got {nodelist!r}, expected names of nodes")
    prefix, ranges = match.groups()
    return prefix + (re.split(r"[,-]", ranges)[0] if ranges else "")


def _slurm_master(host: str) -> str:
    """Return the name of the first node, or srun's address if node names do not resolve."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        # sbatch runs the script, and so srun, on the first node.
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fill_environment() -> None:
    """Set RANK and the other variables of a job from SLURM's, or for a single rank.

    Raises:
        MachineError: a variable is missing or invalid.
    """
    os.environ.update(job_of(os.environ))
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except (OSError, UnicodeError) as error:
        raise MachineError(
            f"MASTER_ADDR: got {os.environ['MASTER_ADDR']!r}, expected a name or address that this "
            f"machine finds ({first_line(error)})"
        ) from error
    known = [name for _, name in socket.if_nameindex()]
    for given in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if given not in known:
            raise MachineError(
                f"GLOO_SOCKET_IFNAME: got {given!r}, expected an interface of this machine "
                f"({', '.join(known)}); or unset it"
            )


def job_of(env: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this environment.

    Raises:
        MachineError: a variable is missing or invalid.
    """
    for name in ("CROSS_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NNODES", "SLURM_NTASKS"):
        _read_number(env, name, "1", 1)
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        job = _slurm_job(env)
    elif "RANK" in env:
        job = {name: env[name] for name in _JOB if name in env}
        if missing := [name for name in _JOB if name not in {"LOCAL_RANK", *job}]:
            raise MachineError(f"RANK is set without {_join_words(missing)}; {_REMEDY}")
        job.setdefault("LOCAL_RANK", "0")
    elif _read_number(env, "WORLD_SIZE", "1", 1) > 1:
        raise MachineError(f"WORLD_SIZE is {env['WORLD_SIZE']}, and RANK is not set; {_REMEDY}")
    else:
        local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **local}
    size = _read_number(job, "WORLD_SIZE", None, 1)
    _read_number(job, "RANK", None, 0, size - 1)
    _read_number(job, "LOCAL_RANK", None, 0, size - 1)
    _read_number(job, "MASTER_PORT", None, 1, 65535)
    return job


def _slurm_job(env: Mapping[str, str]) -> dict[str, str]:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    missing = [] if nodes or "MASTER_ADDR" in env else ["SLURM_JOB_NODELIST"]
    missing += [] if {"MASTER_PORT", "SLURM_JOB_ID"} & env.keys() else ["SLURM_JOB_ID"]
    if missing:
        raise MachineError(f"SLURM_PROCID is set without {_join_words(missing)}; {_REMEDY}")
    size = _read_number(env, "SLURM_NTASKS", None, 1)
    job = {
        "RANK": str(_read_number(env, "SLURM_PROCID", None, 0, size - 1)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_read_number(env, "SLURM_LOCALID", "0", 0, size - 1)),
    }
    job["MASTER_ADDR"] = env.get("MASTER_ADDR") or _slurm_master(_first_slurm_host(nodes or ""))
    # All tasks must choose the same port without communicating, so it follows from the job's
    # number.
    port = 20000 + _read_number(env, "SLURM_JOB_ID", "0", 0) % 20000
    return {**job, "MASTER_PORT": env.get("MASTER_PORT", str(port))}


def _read_number(
    env: Mapping[str, str], name: str, default: str | None, least: int, most: float = math.inf
) -> int:
    given = env[name] if default is None else env.get(name, default)
    if not (given.isascii() and given.isdigit() and least <= int(given) <= most):
        bound = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise MachineError(f"{name}: got {given!r}, expected a whole number {bound}; {_REMEDY}")
    return int(given)


def _join_words(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def seconds_after_sigterm() -> float | None:
    """Return the seconds from SIGTERM to the launcher's SIGKILL, or None if it sends none."""
    return 30.0 if _is_launched_by_deepspeed() else None


def _is_launched_by_deepspeed() -> bool:
    return "CROSS_SIZE" in os.environ and "SLURM_PROCID" not in os.environ


@contextlib.contextmanager
def free_master_port() -> Iterator[None]:
    """Choose another port for the ranks of a `deepspeed` launcher on one machine if its port is
    taken, as its default is the same for every job.

    Rank 0 writes the port into a file, and the launcher's other children wait for that file.
    """
    env = os.environ
    if not (
        _is_launched_by_deepspeed() and env["CROSS_SIZE"] == "1" and int(env["WORLD_SIZE"]) > 1
    ):
        yield
        return
    import psutil

    directory = private_directory()
    if directory is None:  # true on every rank, so they meet at the launcher's port
        yield
        return
    launcher = psutil.Process(os.getppid())
    path = directory / f"port-{launcher.pid}"
    if env["RANK"] == "0":
        if _is_taken(int(env["MASTER_PORT"])):
            env["MASTER_PORT"] = str(free_port())
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        write_new(fresh, env["MASTER_PORT"])
        fresh.replace(path)
    else:
        # An older file belongs to an earlier launcher with the same process number.
        port = _wait_for_text(path, newer_than=launcher.create_time() - 1)
        # Without a port rank 0 has ended, and its own message says why.
        env["MASTER_PORT"] = port or env["MASTER_PORT"]
    try:
        yield
    finally:
        if env["RANK"] == "0":
            path.unlink(missing_ok=True)


def _wait_for_text(path: Path, newer_than: float, seconds: float = 60) -> str | None:
    """Wait for a file of this user that is newer, and return its text, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = read_own(path)
        if found is not None and found[1] >= newer_than:
            return found[0]
        time.sleep(0.05)
    return None


@contextlib.contextmanager
def name_meeting_place() -> Iterator[None]:
    """Add the address to torch's error if the ranks cannot meet.

    Raises:
        MachineError: torch raised a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        env = os.environ
        interfaces = [n for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if env.get(n)]
        told = "".join(f", {name}={env[name]}" for name in interfaces)
        raise MachineError(
            f"{env['WORLD_SIZE']} rank(s) cannot meet at "
            f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}{told}: {first_line(error)}\n"
            f"Every rank must be started, reach that host, and where it has several networks "
            f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME must name an interface (ip -brief address "
            f"lists them) or be unset."
        ) from error


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def clear_stale_locks() -> list[Path]:
    """Remove the build locks of torch's C++ extensions whose owner has ended, and return them.

    A process that is killed while DeepSpeed compiles an operator leaves its lock, and every later
    run would wait for it without end. A living owner keeps the file open. In a job of several nodes
    the owner may be on another node, so no lock is removed.
    """
    if _spans_nodes():
        return []
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")]
    held = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            held.add(os.readlink(handle))
    stale = [lock for lock in locks if str(lock.resolve()) not in held and _is_ours(lock)]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _spans_nodes() -> bool:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return (
        int(os.environ.get("WORLD_SIZE", "1")) > here
        or int(os.environ.get("SLURM_NNODES", "1")) > 1
        or int(os.environ.get("CROSS_SIZE", "1")) > 1
    )


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def is_first_here() -> bool:
    """Return whether this process is the first of its parent's children to ask. They compare by a
    file that exists for half a second."""
    if os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1":
        return True
    directory = private_directory()
    if directory is None:  # a message that is printed twice is better than none
        return True
    path = directory / f"failed-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
    try:
        write_new(path, "")
    except FileExistsError:
        return False
    except OSError:
        return True
    time.sleep(0.5)
    path.unlink(missing_ok=True)
    return True
