"""Settle what a run decides by itself when it starts on a machine: the teacher's window, gathers
inside nodes and how often gradients are exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ds_kd.config.schema import RunConfig
from ds_kd.plan.memory import Machine, Shape, Work, bytes_of_sums
from ds_kd.recipe.tuning import gathering, gradients, machine, window
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
    here = machine.Machine(world, min(room.ranks_per_node, world), memory, not room.is_one)
    work = replace(work, student_hpz=_find_partition(work.student_hpz, student, here))
    if work.offload_weights:
        work = replace(work, student_hpz=1)
    wanted, has_gain = cfg.deepspeed.reduce_once, world > 1 or work.offload_optimizer
    fits = bytes_of_sums(student) <= gradients.SHARE * memory and here.has_accelerator
    once = wanted == "true" or (wanted == "auto" and has_gain and fits and work.micro_batches > 1)
    work = replace(work, reduces_once=once)

    # A teacher that is whole on each rank is not gathered.
    if teacher is None or work.teacher_is_whole:
        return replace(work, window=1, hpz=1)
    if not work.offload_teacher:
        work = replace(work, hpz=_find_partition(work.hpz, teacher, here))
    given = cfg.teacher.window
    if given == "auto" and not (world > 1 or work.offload_teacher):
        return replace(work, window=1)
    most = None if given == "auto" else int(given)
    count = Window(most, int(window.SHARE * memory), teacher.hidden * teacher.width)
    return replace(work, window=min(work.micro_batches, count.count(work.tokens)))


def _find_partition(given: int, shape: Shape, here: machine.Machine) -> int:
    """Return the ranks that gather a model's layers among themselves; 1 where all do.

    Args:
        given: zero_hpz_partition_size of the ZeRO file, or 0 where it has none.
    """
    if given:
        return given
    size = gathering.Size(shape.parameters, shape.layer, shape.width)
    zero: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    tuned, _ = gathering.tune(zero, size, here)
    return int(tuned["zero_optimization"].get("zero_hpz_partition_size", 1))
