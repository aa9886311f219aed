"""Choose how often the student's gradients are exchanged in a step."""

from __future__ import annotations

from typing import Any

from ds_kd.config.schema import RunConfig
from ds_kd.parallel.accumulation import BYTES_OF_SUM, Once
from ds_kd.parallel.world import World
from ds_kd.recipe.tuning.engine import count_micro_batches
from ds_kd.recipe.tuning.machine import Machine


def choose_exchange(cfg: RunConfig, engine: Any, world: World) -> Once:
    """Return the choice of a run (a collective)."""
    if world.tensor.size > 1:  # gradients of parts of matrices are reduced otherwise
        return Once()
    machine, count = Machine.of(world), count_micro_batches(cfg, world)
    return choose(cfg.deepspeed.reduce_once, count, engine, machine)


def choose(wanted: str, micro_batches: int, engine: Any, machine: Machine) -> Once:
    """Return whether a step adds up whole gradients and exchanges their sum.

    Args:
        wanted: `deepspeed.reduce_once`.
        micro_batches: of a step on one rank.
        engine: of the student.
    """
    if wanted != "auto" or micro_batches == 1:
        return Once(always=wanted == "true")
    # A single rank has nothing to exchange, but may move gradients to the host.
    has_gain = machine.ranks > 1 or engine.optimizer.offload_optimizer
    if not (machine.has_accelerator and has_gain):
        return Once()
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    needed = sum(p.ds_numel * BYTES_OF_SUM[p.element_size()] for p in trained)
    return Once(needed=needed, memory=machine.memory)
