"""The ranks of a job: joining and leaving it, sums over ranks, and work that rank 0 does first.

`rendezvous` finds out which rank a process is and where the ranks meet.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ds_kd.errors import MachineError, UserError, first_line
from ds_kd.parallel.layout import Group, Layout, lay_out
from ds_kd.parallel.rendezvous import (
    clear_stale_locks,
    fill_environment,
    free_master_port,
    is_first_here,
    job_of,
    name_meeting_place,
)
from ds_kd.process import choose_accelerator

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
_calls = 0  # number of calls of on_rank0 and rank0_first, the same on every rank
#: Classes of a user's mistakes that callers catch; each can be made from a text.
_KNOWN: tuple[type[Exception], ...] = (MachineError, UserError, ValueError, OSError, ImportError)


@dataclass(frozen=True)
class World:
    """This process's place in the job.

    `rank` and `size` count processes; files, random generators and decisions depend on them. Data
    is divided, and results are summed, over a named group: one of `Layout`, or `everyone`. Without
    a layout all ranks see different samples, as only ZeRO splits a model over them.
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    host_group: dist.ProcessGroup | None = None
    layout: Layout | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def everyone(self) -> Group:
        """Return the group of all ranks."""
        return Group(self.rank, self.size, self.host_group)

    @property
    def data(self) -> Group:
        """Return the group of ranks that see different samples."""
        return self.everyone if self.layout is None else self.layout.data

    @property
    def tokens(self) -> Group:
        """Return the group of ranks that see different tokens."""
        return self.everyone if self.layout is None else self.layout.tokens

    @property
    def sequence(self) -> Group:
        """Return the group of ranks that see the parts of the same samples."""
        return Group(0, 1) if self.layout is None else self.layout.sequence

    @property
    def tensor(self) -> Group:
        """Return the group of ranks that hold the parts of the same matrices."""
        return Group(0, 1) if self.layout is None else self.layout.tensor


def start(backend: str = "nccl", timeout_minutes: float = 10) -> World:
    """Join the job and return this process's `World`.

    Args:
        backend: `nccl` or `gloo`; without CUDA `nccl` becomes `gloo`, which the caller reports.
        timeout_minutes: longest wait of a collective for a missing rank.

    Raises:
        MachineError: a variable of the environment is invalid, or the ranks cannot meet.
    """
    fill_environment()
    with free_master_port():
        return _join(backend, timeout_minutes)


def divide(world: World, timeout_minutes: float, tensor: int = 1, sequence: int = 1) -> World:
    """Return the world with its ranks divided into groups (a collective).

    Args:
        world: all ranks; their number is a multiple of the product of both sizes.
        timeout_minutes: as for `start`.
        tensor, sequence: sizes of these groups of the layout.
    """
    if tensor * sequence == 1:
        return world
    timeout = timedelta(minutes=timeout_minutes)

    def new_group(ranks: list[int], on_host: bool) -> dist.ProcessGroup:
        return dist.new_group(ranks, timeout, backend="gloo" if on_host else world.backend)

    made = lay_out(world.rank, world.size, tensor, sequence, world.everyone, new_group)
    return replace(world, layout=made)


def start_or_alone() -> World:
    """Return this process's `World` in the job of a launcher, or a world of one without any.

    It is for work without collectives on the device, whose ranks may finish far apart.

    Raises:
        MachineError: as `start`.
    """
    if job_of(os.environ)["WORLD_SIZE"] != "1":
        return start("gloo", _PATIENCE.total_seconds() / 60)
    choose_accelerator()
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return World(0, 1, torch.device("cuda" if cuda else "cpu"), "gloo")


def _join(backend: str, timeout_minutes: float) -> World:
    clear_stale_locks()
    choose_accelerator()
    import deepspeed

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    backend = backend if cuda or backend != "nccl" else "gloo"
    if cuda:
        choose_gpu()
    else:
        # On a CPU init_distributed would compile and load a shared-memory operator that ZeRO never
        # calls. That needs a compiler and a minute, and a lock left by a killed process would hang
        # all later runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    with name_meeting_place():
        if not dist.is_initialized():
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        host_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        backend=backend,
        host_group=host_group,
    )


def choose_gpu() -> None:
    """Make this rank's GPU the current one, and set LOCAL_RANK to its number.

    A task that sees only its own GPU sees it as number 0, whatever its place on the machine is.
    DeepSpeed reads LOCAL_RANK again for every engine.
    """
    index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)


def stop() -> None:
    """Leave the job together, as a rank that ends early can abort the others. The process may then
    `start` again."""
    if dist.is_initialized():
        import deepspeed

        dist.barrier()
        deepspeed.comm.destroy_process_group()  # with DeepSpeed's own references to the groups


def sum_over(values: Sequence[float] | torch.Tensor, group: Group) -> torch.Tensor:
    """Return the elementwise sum over the ranks of a group.

    Args:
        values: numbers on the host, or a tensor on the device, which is summed there without a
            synchronisation of the host.
        group: `world.tokens` for sums over tokens, `world.everyone` for decisions.

    Returns:
        A tensor of the same shape, in fp64 for numbers (integers are exact to 2⁵³) and in its own
            dtype for a tensor.
    """
    if isinstance(values, torch.Tensor):
        total = values.clone()
        if group.size > 1:
            dist.all_reduce(total, group=group.device_group)
        return total
    total = torch.tensor(list(values), dtype=torch.float64)
    if group.size > 1:
        dist.all_reduce(total, group=group.host_group)
    return total


def sum_by_name(parts: dict[str, torch.Tensor], group: Group) -> dict[str, float]:
    """Return the sums over the ranks of a group, by name, of scalars on the device."""
    here = torch.stack([part.float() for part in parts.values()])
    return dict(zip(parts, sum_over(here, group).tolist(), strict=True))


def _store() -> dist.Store:
    """Return the job's key-value store, which rank 0 keeps. Waiting there has no collective's
    timeout."""
    return dist.distributed_c10d._get_default_store()


def on_rank0(function: Callable[[], T], world: World) -> T:
    """Run `function` on rank 0, and return its (picklable) result or raise its exception on all
    ranks.

    The other ranks wait as long as rank 0 lives, and not only for the timeout of a collective, as
    tokenising a corpus may take hours.
    """
    box: list = [None, None]
    failed: Exception | None = None
    if world.is_main:
        try:
            box[0] = function()
        except Exception as error:  # raised on every rank, so that none waits in vain
            failed, box[1] = error, _pack_error(error)
    if world.size > 1:
        key = _name_call()
        if world.is_main:
            _store().set(key, "done")
        else:
            _store().wait([key], _PATIENCE)
        dist.broadcast_object_list(box, src=0, group=world.host_group)
    if box[1] is not None:
        raise failed or _unpack(box[1])
    return box[0]


def rank0_first(function: Callable[[], T], world: World) -> T:
    """Run `function` on rank 0 and then on the others, so that caches on a shared disk are written
    once.

    Every rank waits for all others without a timeout, and an exception of one is raised on all.
    """
    kept: list[T] = []
    on_rank0(lambda: kept.append(function()), world)
    if world.size == 1:
        return kept[0]
    failed: Exception | None = None
    if not world.is_main:
        try:
            kept.append(function())
        except Exception as error:
            failed = error

    # A collective would fail if a rank took longer than its timeout.
    key = _name_call()
    if _store().add(key, 1) == world.size:
        _store().set(f"{key}/all", "done")
    _store().wait([f"{key}/all"], _PATIENCE)

    packed: list[Any] = [None] * world.size
    mine = None if failed is None else _pack_error(failed)
    dist.all_gather_object(packed, mine, group=world.host_group)
    for each in filter(None, packed):
        raise failed or _unpack(each)
    return kept[0]


def _name_call() -> str:
    """Return a key of the store for this call, the same on every rank."""
    global _calls
    _calls += 1
    return f"ds_kd/call/{_calls}"


def _pack_error(error: Exception) -> tuple[bytes | None, Exception]:
    """Return an exception in a form that can be sent to other ranks: pickled, and as a known class
    with its first line, in case pickle cannot restore it."""
    text = first_line(error)
    known = next((k for k in _KNOWN if isinstance(error, k)), None)
    plain = known(text) if known else RuntimeError(f"{type(error).__name__}: {text}")
    try:
        return pickle.dumps(error), plain
    except Exception:  # the attributes of an exception may raise any error
        return None, plain


def _unpack(packed: tuple[bytes | None, Exception]) -> Exception:
    data, plain = packed
    try:
        found = plain if data is None else pickle.loads(data)
        return found if isinstance(found, Exception) else plain
    except Exception:  # its class takes other arguments than `args`, or is not known here
        return plain


#: Words in the errors of torch and its libraries that show that another rank is gone.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out")
_ROLL_CALL_SECONDS = 3.0


def lost_ranks(error: BaseException, world: World) -> list[int] | None:
    """Return the ranks that an error of a collective is about: those that are dead or hang.

    Every rank that meets the error says so in the store; the others are lost.

    Returns:
        Their numbers; none if all ranks met the error (the network between them failed); None if
            the error has another cause.
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
    except RuntimeError:  # rank 0, which keeps the store, is gone
        return [0]


class RankLostError(UserError):
    """Another rank is gone; the message says which."""


@contextlib.contextmanager
def name_lost_ranks(world: World) -> Iterator[None]:
    """Turn an error of a collective whose ranks are gone into one that names them.

    Raises:
        RankLostError: in place of such an error; other errors are not changed.
    """
    try:
        yield
    except RuntimeError as error:
        lost = lost_ranks(error, world)
        if lost is None:
            raise
        raise RankLostError(
            f"{describe_lost(lost)} does not answer (killed, out of memory, hung or cut off); the "
            f"same command goes on from the last checkpoint"
        ) from error


def describe_lost(ranks: list[int]) -> str:
    """Return words for the result of `lost_ranks`."""
    return f"rank {', '.join(map(str, ranks))}" if ranks else "the network between ranks"


def is_first_to_fail() -> bool:
    """Return whether this rank is the first to ask, so that an error of several ranks is printed
    once. Before `start`, one rank of each node is the first."""
    if not dist.is_initialized():
        return is_first_here()
    try:
        return int(_store().add("ds_kd/failed", 1)) == 1
    except RuntimeError:  # rank 0, which keeps the store, is gone
        return is_first_here()


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier(group=world.host_group)
