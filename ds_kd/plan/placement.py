"""Choose where a teacher lies by the memory plan."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import psutil
import torch

from ds_kd.config.components import ConfigError
from ds_kd.config.methods.check_placement import is_unplaced, note_on_placement
from ds_kd.config.names import AUTO, REPLICATE
from ds_kd.config.schema import RunConfig
from ds_kd.parallel.world import World, on_rank0
from ds_kd.plan.dry_run import model_shape, work_of
from ds_kd.plan.memory import Machine, choose_placement
from ds_kd.plan.samples import data_of


def settle_placement(cfg: RunConfig, world: World) -> RunConfig:
    """Return the config with the teacher's place instead of `auto`, which rank 0 chooses by the
    memory that is free there, and says; any other config as it is. A collective.

    On accelerators a teacher for which no place is named is kept whole if that would be chosen.

    Raises:
        ConfigError: it is `auto`, and a model's config.json cannot be read.
    """
    component, is_asked = cfg.teacher_model, cfg.teacher.placement == AUTO
    is_free = world.device.type != "cpu" and is_unplaced(cfg)
    if component is None or not cfg.loads_teacher or not (is_asked or is_free):
        return cfg

    def choose() -> Any:
        try:
            student, teacher = model_shape(cfg.model, cfg), model_shape(component)
            work = work_of(cfg, world.size, *data_of(cfg)[1:3])
        except ConfigError:
            if is_asked:
                raise
            return None  # the run itself finds out what is wrong
        machine = _measure_machine(world)
        placement, why = choose_placement(student, teacher, work, machine, world.size)
        if is_free and placement != REPLICATE:
            return None
        print(f"teacher.placement: {placement}, {why}", flush=True)
        return placement

    # That the run would choose is told no more.
    teacher = replace(cfg.teacher, placement=on_rank0(choose, world))
    told = note_on_placement(cfg)
    return replace(cfg, teacher=teacher, notes=[note for note in cfg.notes if note not in told])


def _measure_machine(world: World) -> Machine:
    """Return the memory that is free on this rank's device and its node."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    host = psutil.virtual_memory().available
    if world.device.type == "cuda":
        return Machine(torch.cuda.mem_get_info(world.device)[0], host, together)
    return Machine(host // together, None, together, is_one=True)
