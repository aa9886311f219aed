"""Estimate the memory of a rank from the shapes of a run's models alone.

With ZeRO-3 a rank keeps 1/world of the weights, fp32 master weights, optimizer states and
gradients, and all of the small parameters. A step adds gathered layers, activations, gradients on
their way and one chunk of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_kd.config.names import CPU, REPLICATE, ZERO3
from ds_kd.parallel.accumulation import BYTES_OF_SUM
from ds_kd.plan.shapes import Shape, Work, width_at_rest
from ds_kd.plan.step.peak import estimate_step

_SURE = 0.75  # share of a memory that a plan may fill, as peaks are planned within 30 %


def estimate_bytes(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, int]:
    """Estimate the bytes of one rank by purpose; those named `host …` are in the host's memory, and
    those named `disk …` on a disk.

    Returns:
        First the states, which stay, then the additions of a step at its peak.
    """
    trained = 4 * student.trained // world

    # Ranks that share a layer have parts of its weights, and ZeRO shards these over the others.
    def shard(shape: Shape, width: float) -> int:
        return round(width * (shape.parameters // world + shape.small))

    where = "host " if work.offload_weights else ""
    out = {f"{where}student weights": shard(student, student.width)}
    where = "host " if work.offload_optimizer else ""
    out[f"{where}fp32 weights"] = trained
    out[f"{where}optimizer"] = work.optimizer_numbers * trained
    out[f"{where}gradients"] = trained * (2 if work.offload_optimizer else 1)  # and the optimizer's
    if teacher is not None:
        where = "host " if work.offload_teacher else ""
        where = "disk " if work.teacher_is_on_disk else where
        whole = teacher.parameters * teacher.width // work.teacher_tensor
        rounded = shard(teacher, width_at_rest(teacher, work))
        out[f"{where}teacher weights"] = whole if work.teacher_is_whole else rounded
        if work.hpz > 1:
            out["teacher weights, once more"] = whole // work.hpz
    if work.student_hpz > 1:
        out["student weights, once more"] = student.parameters * student.width // work.student_hpz
    if work.cached_head:
        out["teacher's head"] = work.cached_head
    if work.reduces_once:
        out["gradients, summed"] = bytes_of_sums(student) // work.tensor
    return out | estimate_step(student, teacher, work, world)


def bytes_of_sums(student: Shape) -> int:
    """Return the bytes of whole gradients that are added up on a rank in fp32, and of those that
    come from backward beside them in bf16."""
    return student.trained * BYTES_OF_SUM[student.width]


def is_state(name: str) -> bool:
    """Return whether a part of `estimate_bytes` stays between steps."""
    return name.removeprefix("host ").removeprefix("disk ") in {
        "student weights", "fp32 weights", "optimizer", "gradients", "teacher weights",
        "teacher weights, once more", "student weights, once more", "teacher's head",
        "gradients, summed",
    }  # fmt: skip


def is_on_device(name: str) -> bool:
    """Return whether a part of `estimate_bytes` is in the accelerator's memory."""
    return not name.startswith(("host ", "disk "))


def on_device(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if is_on_device(name))


def on_host(parts: dict[str, int]) -> int:
    """Return the bytes that one rank keeps in its node's memory."""
    return sum(size for name, size in parts.items() if name.startswith("host "))


@dataclass(frozen=True)
class Machine:
    """The memory of a rank and its node.

    Args:
        room: bytes of an accelerator, or None if unknown.
        host_room: bytes of a node's memory, or None if unknown.
        ranks_per_node: ranks that share a node's memory.
        is_one: a rank computes in its node's memory, of which `room` is its part.
    """

    room: int | None = None
    host_room: int | None = None
    ranks_per_node: int = 8
    is_one: bool = False

    def of_node(self, parts: dict[str, int], world: int) -> int:
        """Return the bytes of a node's memory that its ranks need together."""
        return on_host(parts) * min(world, self.ranks_per_node)

    def lacks(self, parts: dict[str, int], world: int) -> list[str]:
        """Return `accelerator` and `host` if their memory is too small for these parts."""
        too_small = []
        used = sum(parts.values()) if self.is_one else on_device(parts)
        if self.room is not None and used > self.room:
            too_small.append("accelerator")
        if self.host_room is not None and self.of_node(parts, world) > self.host_room:
            too_small.append("host")
        return too_small


def place(work: Work, placement: str) -> Work:
    """Return the work with the teacher in a place of `teacher.placement`."""
    return replace(
        work, teacher_is_whole=placement == REPLICATE, offload_teacher=placement == CPU
    )  # fmt: skip


def choose_placement(
    student: Shape, teacher: Shape, work: Work, machine: Machine, world: int
) -> tuple[str, str]:
    """Return the first of replicate, zero3 and cpu for which a machine has the memory, and the
    reason in words. Each needs less of the accelerator than the one before, and takes longer."""
    assert machine.room is not None
    sure = replace(machine, room=round(_SURE * machine.room))
    places = (REPLICATE, ZERO3) if machine.is_one else (REPLICATE, ZERO3, CPU)
    for placement in places:
        parts = estimate_bytes(student, teacher, place(work, placement), world)
        used = sum(parts.values()) if machine.is_one else on_device(parts)
        sizes = f"{used / 2**30:.1f} of {machine.room / 2**30:.1f} GiB of a rank are planned"
        if not sure.lacks(parts, world):
            return placement, sizes
    return places[-1], f"which needs least, and {sizes}"
