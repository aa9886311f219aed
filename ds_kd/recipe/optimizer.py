"""Build the student's optimizer, on the accelerator or the host, and its learning-rate schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_kd.config.components import Component, ConfigError, instantiate, problem
from ds_kd.config.sections import LRScheduler
from ds_kd.errors import first_line

#: torch's optimizers with fused kernels on both CPU and CUDA.
_FUSED = {f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD")}
_CPU_ADAM, _FUSED_ADAM = (f"deepspeed.ops.adam.{n}" for n in ("DeepSpeedCPUAdam", "FusedAdam"))


def place_optimizer(component: Component, in_host: bool) -> Component:
    """Return the optimizer for states on an accelerator or in the host's memory.

    For the host, torch's Adam and AdamW and DeepSpeed's FusedAdam become DeepSpeed's CPU Adam: the
    same arithmetic with vector instructions on all cores.

    Args:
        component: the optimizer of the YAML.
        in_host: whether `offload_optimizer` puts the states in the host's memory.

    Raises:
        ConfigError: the optimizer cannot work there.
    """
    key = f"{component.key}._target_"
    if not in_host:
        if component.name == _CPU_ADAM:
            hint = "write torch.optim.AdamW, or offload_optimizer in deepspeed.student"
            raise ConfigError([problem(key, _CPU_ADAM, "an optimizer of the accelerator", hint)])
        return component
    known = {  # name → (whether its weight decay is decoupled, its default weight decay)
        "torch.optim.Adam": (False, 0.0),
        "torch.optim.AdamW": (True, 1e-2),
        _FUSED_ADAM: (True, 0.0),
    }
    if component.name in known and set(component.kwargs) <= {"lr", "betas", "eps", "weight_decay"}:
        decoupled, weight_decay = known[component.name]
        kwargs = {"weight_decay": weight_decay, **component.kwargs, "adamw_mode": decoupled}
        return replace(component, name=_CPU_ADAM, kwargs=kwargs)
    if component.name == _FUSED_ADAM:
        hint = f"with offload_optimizer write {_CPU_ADAM}"
        raise ConfigError([problem(key, _FUSED_ADAM, "an optimizer of the host", hint)])
    return component


def build_optimizer(component: Component, parameters: list, named: Component) -> Any:
    """Return the optimizer, with torch's fused kernels unless the YAML chooses others.

    Args:
        component: the optimizer from `place_optimizer`.
        parameters: the trained parameters.
        named: the optimizer of the YAML, used if DeepSpeed cannot build its own in its place.

    Raises:
        ConfigError: it does not take these arguments.
        ValueError: it refuses an argument, or its operator cannot be built.
    """
    chosen = {"fused", "foreach", "differentiable"} & set(component.kwargs)
    extra: dict[str, Any] = {"fused": True} if component.name in _FUSED and not chosen else {}
    extra["model_params" if component.name == _CPU_ADAM else "params"] = parameters
    try:
        return instantiate(component, **extra)
    except RuntimeError as error:  # DeepSpeed cannot build its operator
        if component is named or not named.name.startswith("torch."):
            raise ValueError(first_line(error)) from error
    return build_optimizer(named, parameters, named)


def build_schedule(wanted: LRScheduler | None, total_steps: int) -> Callable[[Any], Any] | None:
    """Return a function that makes the learning-rate schedule of an optimizer; None for a constant
    rate."""
    if wanted is None:
        return None
    from transformers import get_scheduler

    warmup = wanted.num_warmup_steps
    if wanted.warmup_ratio is not None:
        warmup = round(wanted.warmup_ratio * total_steps)
    return functools.partial(
        get_scheduler,
        wanted.name,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=wanted.scheduler_specific_kwargs or None,
    )
