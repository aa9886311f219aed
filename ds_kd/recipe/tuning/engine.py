"""The DeepSpeed configuration of an engine."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import Component
from ds_kd.config.schema import RunConfig
from ds_kd.parallel import engines
from ds_kd.parallel.world import World
from ds_kd.recipe.models import training_dtype
from ds_kd.recipe.tuning.gathering import measure, tune
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
    zero, said = tune(zero, measure(component), Machine.of(world))
    if said and world.is_main:
        print(f"{component.key}: {said}", flush=True)
    dtype, local = training_dtype(component), cfg.step_scheduler.local_batch_size
    return engines.engine_config(zero, dtype, local, count_micro_batches(cfg, world), clip)


def count_micro_batches(cfg: RunConfig, world: World) -> int:
    """Return the number of micro-batches that a step has on one rank."""
    steps = cfg.step_scheduler
    return steps.global_batch_size // (steps.local_batch_size * world.data.size)
