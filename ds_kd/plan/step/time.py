"""Estimate the time of a step on named GPUs: for each phase the longest of its products, its memory
traffic and what it waits for from other ranks.

It is a bound, not a forecast: products at a share of the peak that large matrices reach,
collectives behind the products of the same phase, and no time for launches, data or stragglers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_kd.plan.shapes import Shape, Work
from ds_kd.plan.step.cluster import OF_LINK, Cluster
from ds_kd.plan.step.operations import count_by_phase
from ds_kd.plan.step.traffic import count_exchanges

#: Share of the peak that large products reach.
OF_PEAK = 0.7
_HOST = 2e11  # bytes per second that the processors of a node read and write


@dataclass(frozen=True)
class Phase:
    """A part of a step: seconds of its products, its memory traffic, its collectives and what it
    moves between GPU and host."""

    name: str
    products: float
    memory: float
    exchange: float
    host: float

    @property
    def seconds(self) -> float:
        """Return its time: products and passes over memory one after the other, transfers behind
        them."""
        return max(self.products + self.memory, self.exchange, self.host)


def estimate_phases(
    student: Shape, teacher: Shape | None, work: Work, cluster: Cluster
) -> list[Phase]:
    """Return the phases of one step on a rank."""
    gpu, world = cluster.gpu, cluster.world
    operations = count_by_phase(student, teacher, work)
    exchanges = count_exchanges(student, teacher, work, world)

    # The loss goes over its logits in the student's forward.
    rows = work.micro_batches * work.tokens * work.supervised / work.sequence
    passes = {"student": work.passes * 4 * rows * student.vocabulary / work.tensor}
    # The optimizer reads and writes fp32 weights, its numbers and gradients, and writes weights.
    trained = student.trained / world
    passes["optimizer"] = trained * (8 + 8 * work.optimizer_numbers + 4 + student.width)
    moved = _count_moved(student, teacher, work, world)

    phases = []
    for name in ("teacher", "student", "backward", "optimizer"):
        waits = sum(cluster.seconds(each) for each in exchanges if each.when == name)
        products = operations.get(name, 0.0) / (OF_PEAK * gpu.tflops * 1e12)
        memory = passes.get(name, 0.0) / gpu.bandwidth
        host = moved.get(name, 0.0) / (OF_LINK * gpu.host_link)
        if name == "optimizer" and work.offload_optimizer:
            host += passes[name] * min(world, cluster.per_node) / _HOST
            memory = 0.0
        phases.append(Phase(name, products, memory, waits, host))
    return phases


def _count_moved(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, float]:
    """Return the bytes that a rank moves between its GPU and the host, by phase."""
    moved: dict[str, float] = {}
    shard = student.width * student.parameters / world * work.micro_batches
    if work.offload_weights:
        moved |= {"student": shard, "backward": shard}
    if work.offload_optimizer:
        gradients = 4 * student.trained / world * work.micro_batches
        moved["backward"] = moved.get("backward", 0.0) + gradients
        moved["optimizer"] = student.width * student.trained / world
    if teacher is not None and work.offload_teacher:
        moved["teacher"] = teacher.width * teacher.parameters / world
        moved["teacher"] *= work.micro_batches / work.window
    return moved


def describe_time(student: Shape, teacher: Shape | None, work: Work, cluster: Cluster) -> list[str]:
    """Return lines on the time of a step by phase, and on tokens per second of all ranks."""
    # Ranks that share a layer or a sample have the same tokens.
    phases = estimate_phases(student, teacher, work, cluster)
    seconds = sum(phase.seconds for phase in phases)
    groups = cluster.world / (work.tensor * work.sequence)
    tokens = work.tokens * work.micro_batches * groups / seconds
    done = sum(count_by_phase(student, teacher, work).values())
    share = done / seconds / (cluster.gpu.tflops * 1e12)
    nodes = -(-cluster.world // cluster.per_node)
    lines = [
        f"  time at best, on {cluster.world} × {cluster.gpu.name} in {nodes} node(s): "
        f"{seconds:.3g} s a step, {tokens:,.0f} tokens/s on all ranks, {share:.0%} of the peak"
    ]

    # A phase takes the longest of its parts; the others run behind it.
    for phase in phases:
        parts = [
            f"{what} {value:.3g} s"
            for what, value in (
                ("products", phase.products),
                ("memory", phase.memory),
                ("collectives", phase.exchange),
                ("host", phase.host),
            )
            if value > 0
        ]
        if parts:
            lines.append(f"    {phase.name:<10}{phase.seconds:8.3g} s: {', '.join(parts)}")
    return lines
