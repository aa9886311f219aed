"""Name the GPUs of a run, read sizes, and estimate the time of a collective between GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_kd.config.components import ConfigError, problem
from ds_kd.plan.hardware import GPUS, Gpu
from ds_kd.plan.step.traffic import Exchange

_GB = {
    "TB": 1e12,
    "TIB": 2**40,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
#: Share of a link's peak that long transfers reach.
OF_LINK = 0.8


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind and what joins them.

    Args:
        gpu: one of them.
        world: their number.
        per_node: of one node.
        network: bytes per second that a GPU receives from other nodes; None takes the GPU's own.
    """

    gpu: Gpu
    world: int
    per_node: int
    network: float | None = None

    def seconds(self, exchange: Exchange) -> float:
        """Return the time of a collective: a ring over all its ranks, which enters a node once."""
        here = max(1, min(exchange.ranks, self.per_node // exchange.stride))
        seconds = exchange.received / (OF_LINK * self.gpu.link) if here > 1 else 0.0
        nodes = exchange.ranks / here
        if nodes > 1:
            # All GPUs of a node share its network, and so do the groups of which it has members.
            crossing = exchange.size * (nodes - 1) / nodes * (self.per_node / here)
            crossing *= 2 if exchange.kind == "all_reduce" else 1
            network = (self.network or self.gpu.network) * self.per_node
            seconds = max(seconds, crossing / (OF_LINK * network))
        return seconds


def make_cluster(
    name: str | None, world: int, per_node: int, network: float | None = None
) -> Cluster | None:
    """Return the cluster of a run, or None if its GPUs are not known.

    Args:
        name: of its GPUs; None takes those of this machine.
        world: number of ranks.
        per_node: ranks of a node.
        network: Gbit/s that each GPU receives from other nodes; None takes what is usual for it.

    Raises:
        ConfigError: there is no such name.
    """
    if name is not None and name.lower() not in GPUS:
        raise ConfigError([problem("--gpu", name, " or ".join(GPUS))])
    gpu = find_gpu() if name is None else GPUS[name.lower()]
    if gpu is None:
        return None
    rate = None if network is None else network * 1e9 / 8
    return Cluster(gpu, world, min(per_node, world), rate)


def divide_over_nodes(ranks: int, nodes: int) -> int:
    """Return the ranks of a node.

    Raises:
        ConfigError: they cannot be divided evenly.
    """
    if ranks % nodes:
        expected = f"a number of nodes that divides {ranks} ranks"
        raise ConfigError([problem("--nodes", nodes, expected)])
    return ranks // nodes


def find_gpu() -> Gpu | None:
    """Return the GPU of this machine if it is one that has a name here."""
    import torch

    if not torch.cuda.is_available():
        return None
    told = torch.cuda.get_device_name(0).lower()
    memory = torch.cuda.get_device_properties(0).total_memory
    named = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] in told]
    return min(named, key=lambda gpu: abs(gpu.memory - memory), default=None)


def bytes_of(text: str, option: str = "--gpu-memory") -> int:
    """Return the bytes of a size such as `80GB` or `24GiB`.

    Args:
        option: the option of the command line, for the message.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]I?B)", text.strip().upper())
    if match is None or match[2] not in _GB or float(match[1]) <= 0:
        raise ConfigError([problem(option, text, "a size such as 80GB or 24GiB")])
    return int(float(match[1]) * _GB[match[2]])
