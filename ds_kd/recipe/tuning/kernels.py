"""Replace operations of a model by faster kernels where that is asked for."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from ds_kd.config.components import Component
from ds_kd.parallel.world import World


def replace_kernels(component: Component, model: Any, world: World) -> None:
    """Use the kernels that a model section asks for, and print where that cannot be done."""
    if component.kwargs.get("use_liger_kernel"):
        reason = use_liger_kernels(model)
        if reason and world.is_main:
            print(f"{component.key}.use_liger_kernel: not used; {reason}", flush=True)


def use_liger_kernels(model: Any) -> str:
    """Replace a model's RMSNorm, rotary positions and gated MLP by the kernels of liger-kernel, one
    launch each, and return an empty text, or why that cannot be done.

    It comes before `FrozenModel`, which wraps the last MLP. Rotary positions are replaced for all
    models of the class.

    Args:
        model: an HF model.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return "they need an NVIDIA GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "pip install liger-kernel"
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has none for {kind}"
    monkey_patch._apply_liger_kernel_to_instance(
        model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return ""
