"""Ranks: who is in the job, how they meet, and sums over all of them.

The launcher does not matter. `deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and
MASTER_*; `srun` sets SLURM_* instead, which DeepSpeed does not read; plain `python` sets nothing
and is a world of one. `start` makes them all look alike.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_kd.parallel.private_files import private_directory, read_own, write_new

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
_calls = 0  # of on_rank0; the same on every rank, as all of them are collective


@dataclass(frozen=True)
class World:
    """This process's place in the job.

    `host_group` carries small CPU tensors (counts, decisions) over gloo: agreeing on an integer
    must not make the host wait for the GPU's queue, as an NCCL collective followed by `.item()`
    would.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _first_slurm_host(nodelist: str) -> str:
    """`gpu[03-05,9],cpu1` → `gpu03`: SLURM's compressed host list, first entry."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodelist)
    assert match is not None
    prefix, ranges = match.groups()
    return prefix + (re.split(r"[,-]", ranges)[0] if ranges else "")


def _slurm_master(host: str) -> str:
    """The first node: its name or, where names of nodes do not resolve, srun's own address."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        # sbatch runs the script, and so srun, on the first node.
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fill_environment() -> None:
    """Give RANK & co. their values from SLURM, or those of a world of one."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        env.setdefault("MASTER_ADDR", _slurm_master(_first_slurm_host(nodes)))
        # Every task must name the same port without talking first: derive it from the job's number.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    elif "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(_free_port())
    env.setdefault("LOCAL_RANK", "0")


def seconds_after_sigterm() -> float | None:
    """How long this process lives on after SIGTERM; None where its launcher leaves it alone."""
    return 30.0 if _launched_by_deepspeed() else None


def _launched_by_deepspeed() -> bool:
    return "CROSS_SIZE" in os.environ and "SLURM_PROCID" not in os.environ


@contextlib.contextmanager
def _free_master_port() -> Iterator[None]:
    """Let the ranks of a `deepspeed` launcher on one machine meet at another port where the
    launcher's is taken: its default is the same for every job.

    Rank 0 writes the port it found into a file that the launcher's other children wait for.
    """
    env = os.environ
    if not (_launched_by_deepspeed() and env["CROSS_SIZE"] == "1" and int(env["WORLD_SIZE"]) > 1):
        yield
        return
    import psutil

    directory = private_directory()
    if directory is None:  # the same for every rank: they meet at the launcher's port
        yield
        return
    launcher = psutil.Process(os.getppid())
    path = directory / f"port-{launcher.pid}"
    if env["RANK"] == "0":
        if _is_taken(int(env["MASTER_PORT"])):
            env["MASTER_PORT"] = str(_free_port())
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        write_new(fresh, env["MASTER_PORT"])
        fresh.replace(path)
    else:
        # A file from before belongs to a launcher that had the same number.
        port = _wait_for_text(path, newer_than=launcher.create_time() - 1)
        # Without: rank 0 has ended; its own message says why.
        env["MASTER_PORT"] = port or env["MASTER_PORT"]
    try:
        yield
    finally:
        if env["RANK"] == "0":
            path.unlink(missing_ok=True)


def _wait_for_text(path: Path, newer_than: float, seconds: float = 60) -> str | None:
    """What is in a file of ours that was written since; None after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = read_own(path)
        if found is not None and found[1] >= newer_than:
            return found[0]
        time.sleep(0.05)
    return None


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def start(backend: str = "nccl", timeout_minutes: float = 10) -> World:
    """Join the job and return this process's `World`.

    Args:
        backend: `nccl` or `gloo`; `nccl` on a machine without CUDA becomes `gloo` (the caller says
            so to the user).
        timeout_minutes: how long a collective may wait for a missing rank.
    """
    _fill_environment()
    with _free_master_port():
        return _join(backend, timeout_minutes)


def _join(backend: str, timeout_minutes: float) -> World:
    clear_stale_locks()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    cuda = torch.cuda.is_available()
    backend = backend if cuda or backend != "nccl" else "gloo"
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        # Where each task is shown a GPU of its own, that one is number 0 to it.
        local_rank %= torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
    else:
        # On CPU every init_distributed compiles and loads a shared-memory op which ZeRO never
        # calls: it needs a compiler, costs a minute the first time, and a lock left by a killed
        # process hangs all later runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        device=torch.device(get_accelerator().device_name(local_rank) if cuda else "cpu"),
        backend=backend,
        host_group=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)),
    )


def clear_stale_locks() -> list[Path]:
    """Remove the build locks of torch's C++ extensions whose owner is gone, and return them.

    A process that is killed while DeepSpeed compiles an operator leaves its lock, and every later
    run would wait for it for ever without a word. A living owner keeps the file open. In a job of
    several nodes it may live on another one: there the locks are left alone.
    """
    if _spans_nodes():
        return []
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")]
    held = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
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


def stop() -> None:
    """Leave the job together; without this a rank that ends early can abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float] | torch.Tensor, world: World) -> torch.Tensor:
    """Elementwise sum over all ranks.

    Args:
        values: numbers on the host, or a tensor on the device (which stays there, without a host
            sync).

    Returns:
        A tensor of the same shape: fp64 for host numbers (integers are exact to 2⁵³), the given
            dtype for a tensor.
    """
    if isinstance(values, torch.Tensor):
        total = values.clone()
        if world.size > 1:
            dist.all_reduce(total)
        return total
    total = torch.tensor(list(values), dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(total, group=world.host_group)
    return total


def _store() -> dist.Store:
    """The job's own key-value store, kept by rank 0: waiting there is no collective and has no
    collective's timeout."""
    return dist.distributed_c10d._get_default_store()


def on_rank0(function: Callable[[], T], world: World) -> T:
    """Run `function` on rank 0 and give its (picklable) result to all; its exception reaches all
    ranks too.

    The others wait for as long as rank 0 lives, not for the timeout of a collective: tokenising a
    corpus may take hours.
    """
    global _calls
    _calls += 1
    box: list = [None, None]
    if world.is_main:
        try:
            box[0] = function()
        # Carried to every rank: nobody may be left waiting in a collective.
        except Exception as error:
            box[1] = error
    if world.size > 1:
        key = f"ds_kd/on_rank0/{_calls}"
        if world.is_main:
            _store().set(key, "done")
        else:
            _store().wait([key], _PATIENCE)
        dist.broadcast_object_list(box, src=0, group=world.host_group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def rank0_first(function: Callable[[], T], world: World) -> T:
    """Run `function` on rank 0, then on the others: caches on a shared disk are written once."""
    kept: list[T] = []
    on_rank0(lambda: kept.append(function()), world)
    return kept[0] if kept else function()


#: Words of torch's and its libraries' errors that mean that another rank is gone.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out")
_ROLL_CALL_SECONDS = 3.0


def lost_ranks(error: BaseException, world: World) -> list[int] | None:
    """Whom an error of a collective is about: the ranks that do not meet it within seconds, being
    dead or hung.

    Returns:
        Their numbers; empty where all of them met it (a network between them that is gone); None
            for errors that are about something else.
    """
    if world.size == 1 or not isinstance(error, RuntimeError):
        return None
    of_the_store = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    if not of_the_store and not any(word in str(error) for word in _LOST):
        return None
    try:
        store = _store()
        store.set(f"ds_kd/met_it/{world.rank}", "1")
        time.sleep(_ROLL_CALL_SECONDS)
        names = {rank: f"ds_kd/met_it/{rank}" for rank in range(world.size)}
        return [rank for rank, name in names.items() if not store.check([name])]
    except RuntimeError:  # it was kept by rank 0
        return [0]


class RankLostError(RuntimeError):
    """Another rank is gone; the message says which."""


@contextlib.contextmanager
def naming_lost_ranks(world: World) -> Iterator[None]:
    """Turn an error of a collective that is about ranks which are gone into one that names them.

    Raises:
        RankLostError: in its place; the project's own errors and all others pass.
    """
    try:
        yield
    except RuntimeError as error:
        known = type(error).__module__.startswith("ds_kd.")
        lost = None if known else lost_ranks(error, world)
        if lost is None:
            raise
        who = f"rank {', '.join(map(str, lost))}" if lost else "the network between ranks"
        raise RankLostError(
            f"{who} does not answer (killed, out of memory, hung or cut off); the same command "
            f"goes on from the last checkpoint"
        ) from error


def is_first_to_fail() -> bool:
    """Whether this rank is the first to ask: of an error that all ranks meet one shall speak, and
    of an error that only one meets that one. Before `start`, one of each node."""
    if not dist.is_initialized():
        return _is_first_here()
    try:
        return int(_store().add("ds_kd/failed", 1)) == 1
    except RuntimeError:  # rank 0, which keeps the store, is gone
        return _is_first_here()


def _is_first_here() -> bool:
    """Among the processes of one parent, by a file that lives for half a second."""
    if os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1":
        return True
    directory = private_directory()
    if directory is None:  # better twice than never
        return True
    path = directory / f"failed-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
    try:
        write_new(path, "")
    except FileExistsError:
        return False
    except OSError:  # nowhere to write: better twice than never
        return True
    time.sleep(0.5)
    path.unlink(missing_ok=True)
    return True


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier(group=world.host_group)
