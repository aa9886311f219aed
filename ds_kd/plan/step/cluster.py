"""Name the GPUs of a run, read sizes, and estimate the time of a collective between GPUs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ds_kd.config.components import ConfigError, problem
from ds_kd.plan.hardware import GPUS, NETWORKS, Gpu
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
    name: str | None, world: int, per_node: int, network: str | None = None
) -> Cluster | None:
    """Return the cluster of a run, or None if its GPUs are not known.

    Args:
        name: of its GPUs; None takes those of this machine.
        world: number of ranks.
        per_node: ranks of a node.
        network: of each GPU between nodes, a name or Gbit/s; None takes what is usual for it.

    Raises:
        ConfigError: there is no such GPU, or no such network, or a network and no GPU.
    """
    rate = None if network is None else read_network(network)
    if name is not None and name.lower() not in GPUS:
        raise ConfigError([problem("--gpu", name, " or ".join(GPUS))])
    gpu = find_gpu() if name is None else GPUS[name.lower()]
    if gpu is None:
        if network is not None:
            expected = "--gpu beside it, as the time of a step is told for named GPUs"
            raise ConfigError([problem("--network", network, expected)])
        return None
    return Cluster(gpu, world, min(per_node, world), rate)


def read_network(text: str) -> float:
    """Return the bytes per second of a network that is named, or given in Gbit/s.

    Raises:
        ConfigError: it is neither.
    """
    rate = NETWORKS.get(text.strip().lower())
    if rate is None:
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
    if not 0 < rate < math.inf:
        expected = f"{' or '.join(NETWORKS)}, or Gbit/s of each GPU such as 400"
        raise ConfigError([problem("--network", text, expected)])
    return rate * 1e9 / 8


def divide_over_nodes(
    ranks: int, nodes: int, per_node: int | None = None, option: str = "--ranks"
) -> int:
    """Return the ranks of a node.

    Args:
        per_node: the ranks of a node that were given too, or None.
        option: of the command that gives the ranks, for the message.

    Raises:
        ConfigError: they cannot be divided evenly, or were given as another number.
    """
    if ranks % nodes:
        expected = f"a number of nodes that divides {ranks} rank(s)"
        hint = f"give the ranks of all nodes with {option}"
        raise ConfigError([problem("--nodes", nodes, expected, hint)])
    if per_node not in (None, ranks // nodes):
        expected = f"{ranks // nodes}, as {ranks} ranks on {nodes} nodes have, or one of both alone"
        raise ConfigError([problem("--ranks-per-node", per_node, expected)])
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
