"""Choose how a model's matrices are cut over ranks."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import Component, config_error
from ds_kd.config.methods.check_tensor import (
    KEY,
    REMEDY,
    REMEDY_OF_TEACHER,
    find_misfit,
)
from ds_kd.config.schema import RunConfig
from ds_kd.parallel.tensor import cut_layers
from ds_kd.recipe.models import config_of, name_of


def choose_cuts(cfg: RunConfig, component: Component, size: int) -> dict[str, Any]:
    """Return the part of an engine's configuration that cuts a model over `size` ranks; none for a
    teacher that stays whole.

    Raises:
        ConfigError: it cannot be cut so; a model from the hub is first looked at here.
    """
    if size == 1 or (component is not cfg.model and cfg.teacher_tp_size == 1):
        return {}
    config = config_of(component)
    with config_error(component.key, name_of(component), f"a model that {KEY}: {size} can cut"):
        remedy = REMEDY if component is cfg.model else REMEDY_OF_TEACHER
        parts = cfg.distributed.cp_size or 1
        if misfit := find_misfit(config.get_text_config().to_dict(), size, parts, remedy):
            raise ValueError(misfit)
        return cut_layers(config, size, trains=component is cfg.model and cfg.peft is None)
