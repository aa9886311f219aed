"""The DeepSpeed configuration of an engine."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import Component
from ds_kd.config.schema import RunConfig
from ds_kd.parallel import engines
from ds_kd.parallel.world import World
from ds_kd.recipe.models import training_dtype
from ds_kd.recipe.tuning.cuts import choose_cuts
from ds_kd.recipe.tuning.gathering import Size, count_copy, count_states, measure, tune
from ds_kd.recipe.tuning.machine import Machine


def make_engine_config(
    cfg: RunConfig, component: Component, zero: dict[str, Any], world: World, clip: float | None
) -> dict[str, Any]:
    """Return the configuration of a model's engine (a collective), and print what its ZeRO file
    leaves open where that takes memory.

    Args:
        component: the model.
        zero: the checked content of its ZeRO file.
        clip: norm to which gradients are clipped, or None.
    """
    machine = Machine.of(world)
    size, taken = _measure(cfg, component, machine)
    is_updated_each_pass = component is cfg.model and count_micro_batches(cfg, world) == 1
    zero, said = tune(zero, size, machine, taken, is_updated_each_pass)
    if said and world.is_main:
        print(f"{component.key}: {said}", flush=True)
    dtype, local = training_dtype(component), cfg.step_scheduler.local_batch_size
    made = engines.engine_config(zero, dtype, local, count_micro_batches(cfg, world), clip)
    return made | choose_cuts(cfg, component, world.tensor.size)


def _measure(cfg: RunConfig, component: Component, machine: Machine) -> tuple[Size | None, int]:
    """Return the size of a model, and the bytes of a rank that both models take, with a copy of the
    other one if that comes first: the teacher."""
    if machine.ranks == 1:
        return None, 0
    size = measure(component)
    if machine.ranks_per_node == machine.ranks:
        return size, 0
    is_student = component is cfg.model
    teacher = size if not is_student else None
    if is_student and cfg.loads_teacher and cfg.teacher_model is not None:
        teacher = measure(cfg.teacher_model)
    taken = count_states(size if is_student else measure(cfg.model), teacher, machine)
    return size, taken + (count_copy(teacher, machine) if is_student else 0)


def count_micro_batches(cfg: RunConfig, world: World) -> int:
    """Return the number of micro-batches that a step has on one rank."""
    steps = cfg.step_scheduler
    return steps.global_batch_size // (steps.local_batch_size * world.data.size)
