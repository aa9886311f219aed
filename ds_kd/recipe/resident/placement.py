"""The ZeRO configuration of a teacher that runs, after checks that need its files or the machine.

`int8` is DeepSpeed's `quantized_initialization`: linear maps and embeddings are kept as 8-bit
numbers with a scale and a smallest value for each group of a row, and become numbers of the model's
dtype when they are used. The scales lie in the bytes of that dtype beside them, so that the files
must be in it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_kd.config.checks.zero_file import place_teacher
from ds_kd.config.components import Component, config_error
from ds_kd.config.methods.check_placement import EXPECTED, explain_int8, group_of
from ds_kd.config.names import INT8
from ds_kd.config.schema import RunConfig
from ds_kd.models.files.weight_files import WeightFiles, empty_model
from ds_kd.recipe.models import (
    config_of,
    name_of,
    select_location,
    select_trust,
    training_dtype,
)

_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors writes them


def make_teacher_zero(cfg: RunConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration of where the teacher's weights lie.

    Raises:
        ConfigError: its weights cannot be kept in 8 bits.
    """
    wanted, component = cfg.teacher, cfg.teacher_model
    assert component is not None
    config = place_teacher(cfg.deepspeed.teacher, wanted.placement, cfg.offload_teacher_model)
    with config_error("teacher.placement", wanted.placement, EXPECTED):
        if wanted.placement == INT8:
            config |= quantize(component)
            # A second copy inside each machine would be one of numbers in 8 bits too.
            config["zero_optimization"]["zero_hpz_partition_size"] = 1
    return config


def quantize(component: Component) -> dict[str, Any]:
    """Return DeepSpeed's keys that keep a model's weights in 8 bits.

    Raises:
        ValueError: its files are of another dtype than it runs in, or its widths have no group.
    """
    model = empty_model(config_of(component), **select_trust(component))
    files = WeightFiles(name_of(component), select_location(component))
    matrices: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            # A weight that the files lack is tied to another.
            found = files.find(f"{name}.weight", model.base_model_prefix)
            if found is not None:
                matrices[found] = files.dtypes[found], module.weight.shape[1]
    if reason := explain_int8(component, _DTYPES[training_dtype(component)], matrices):
        raise ValueError(reason)
    groups = {"num_bits": 8, "group_size": group_of(matrices), "group_dim": 1, "symmetric": False}
    return {"weight_quantization": {"quantized_initialization": groups}}
