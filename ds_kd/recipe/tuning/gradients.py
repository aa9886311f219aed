"""Choose how often the student's gradients are exchanged in a step."""

from __future__ import annotations

from typing import Any

from ds_kd.parallel.accumulation import BYTES_OF_SUM
from ds_kd.recipe.tuning.machine import Machine

#: Share of a rank's memory that whole gradients may take.
_SHARE = 1 / 8


def reduces_once(wanted: str, micro_batches: int, engine: Any, machine: Machine) -> bool:
    """Return whether a step adds up whole gradients and exchanges their sum.

    Args:
        wanted: `deepspeed.reduce_once`.
        micro_batches: of a step on one rank.
        engine: of the student.
    """
    if wanted != "auto" or micro_batches == 1:
        return wanted == "true"
    # A single rank has nothing to exchange, but may move gradients to the host.
    has_gain = machine.ranks > 1 or engine.optimizer.offload_optimizer
    if not (machine.has_accelerator and has_gain):
        return False
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    needed = sum(p.ds_numel * BYTES_OF_SUM[p.element_size()] for p in trained)
    return needed <= _SHARE * machine.memory
