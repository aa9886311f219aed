"""The machines on which the ranks of a job run, and what memory each rank has there."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

from ds_kd.parallel.world import World


def list_hosts(world: World) -> list[str]:
    """Return the name of each rank's machine, in the order of the ranks (a collective)."""
    names: list[str] = [socket.gethostname()] * world.size
    if world.size > 1:
        dist.all_gather_object(names, socket.gethostname(), group=world.host_group)
    return names


def count_ranks_per_node(hosts: Sequence[str]) -> int | None:
    """Return how many ranks each machine has, or None if not all have as many, or if ranks of one
    machine do not follow one another.

    Args:
        hosts: from `list_hosts`.
    """
    runs = [len([*group]) for _, group in itertools.groupby(hosts)]
    is_even = len(set(runs)) == 1 and len(runs) == len(set(hosts))
    return runs[0] if is_even else None


def measure_memory(world: World, hosts: Sequence[str]) -> int:
    """Return the bytes of memory of one rank: its accelerator's, or its share of the machine's.
    Ranks agree on the smallest (a collective)."""
    if world.device.type == "cuda":
        here = torch.cuda.mem_get_info(world.device)[1]
    else:
        here = psutil.virtual_memory().total // max(1, hosts.count(hosts[world.rank]))
    least = torch.tensor(here)
    if world.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN, group=world.host_group)
    return int(least)
