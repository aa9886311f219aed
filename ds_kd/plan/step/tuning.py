"""Settle what a run decides by itself when it starts on a machine: the teacher's window, gathers
inside nodes and how often gradients are exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ds_kd.config.schema import RunConfig
from ds_kd.parallel.accumulation import FULL
from ds_kd.plan.memory import Machine, Shape, Work, bytes_of_sums, estimate_bytes, on_device
from ds_kd.recipe.tuning import gathering, machine, window
from ds_kd.teachers.window import Window

_MEMORY = 80 * 10**9  # bytes of a rank whose memory is not told


def tune_work(
    cfg: RunConfig, work: Work, student: Shape, teacher: Shape | None, room: Machine, world: int
) -> Work:
    """Return the work as a run on such a machine tunes it.

    Args:
        room: the memory of a rank and the ranks of a node; an accelerator's unless it `is_one`.
        world: number of ranks.
    """
    memory = _MEMORY if room.room is None else room.room
    shares_samples = work.tensor > 1 or work.sequence > 1
    per_node = None if shares_samples else min(room.ranks_per_node, world)
    here = machine.Machine(world, per_node, memory, not room.is_one)
    sizes = _measure(student), None if teacher is None else _measure(teacher)
    taken = gathering.count_states(*sizes, here)
    with_copy = taken + gathering.count_copy(sizes[1], here)
    each = work.micro_batches == 1
    work = replace(
        work, student_hpz=_find_partition(work.student_hpz, sizes[0], here, with_copy, each)
    )
    is_cut = work.tensor > 1
    if work.offload_weights or is_cut:
        work = replace(work, student_hpz=1)
    work = _tune_teacher(cfg, work, teacher, here, taken)

    # A run decides by the memory that its first step leaves if gradients are exchanged once.
    wanted, has_gain = cfg.deepspeed.reduce_once, world > 1 or work.offload_optimizer
    once = wanted == "true" and not is_cut
    if wanted == "auto" and has_gain and not is_cut and here.has_accelerator and not each:
        first = on_device(estimate_bytes(student, teacher, work, world))
        once = first + bytes_of_sums(student) <= FULL * memory
    return replace(work, reduces_once=once)


def _tune_teacher(
    cfg: RunConfig, work: Work, teacher: Shape | None, here: machine.Machine, taken: int
) -> Work:
    """Return the work with the teacher's window and the ranks that gather its layers.

    Args:
        taken: bytes of a rank that both models' shards take.
    """
    # A teacher that is whole on each rank is not gathered.
    if teacher is None or work.teacher_is_whole:
        return replace(work, window=1, hpz=1)
    if work.tensor > 1:
        work = replace(work, hpz=1)
    elif not work.offload_teacher:
        work = replace(work, hpz=_find_partition(work.hpz, _measure(teacher), here, taken))
    given = cfg.teacher.window
    is_far = here.ranks > 1 or work.offload_teacher
    if work.tensor > 1 or work.sequence > 1 or (given == "auto" and not is_far):
        return replace(work, window=1)
    most = None if given == "auto" else int(given)
    count = Window(most, int(window.SHARE * here.memory), teacher.hidden * teacher.width)
    return replace(work, window=min(work.micro_batches, count.count(work.tokens)))


def _measure(shape: Shape) -> gathering.Size:
    return gathering.Size(shape.parameters, shape.layer, shape.width)


def _find_partition(
    given: int, size: gathering.Size, here: machine.Machine, taken: int, each: bool = False
) -> int:
    """Return the ranks that gather a model's layers among themselves; 1 where all do.

    Args:
        given: zero_hpz_partition_size of the ZeRO file, or 0 where it has none.
        taken, each: as `gathering.tune` takes them.
    """
    if given:
        return given
    zero: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    tuned, _ = gathering.tune(zero, size, here, taken, each)
    return int(tuned["zero_optimization"].get("zero_hpz_partition_size", 1))
