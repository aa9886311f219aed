"""The machine of a run, as far as the exchange between ranks depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from ds_kd.parallel.nodes import count_ranks_per_node, list_hosts, measure_memory
from ds_kd.parallel.world import World


@dataclass(frozen=True)
class Machine:
    """The ranks of a job and their memory; the same on every rank.

    Args:
        ranks: of the job.
        ranks_per_node: of each machine, or None if they differ, or share more than the data.
        memory: bytes of one rank.
        has_accelerator: whether this is an accelerator's memory.
    """

    ranks: int
    ranks_per_node: int | None
    memory: int
    has_accelerator: bool

    @classmethod
    def of(cls, world: World) -> Machine:
        """Return the machine of a job (a collective)."""
        hosts = list_hosts(world)
        return cls(
            world.size,
            count_ranks_per_node(hosts) if world.layout is None else None,
            measure_memory(world, hosts),
            world.device.type != "cpu",
        )
