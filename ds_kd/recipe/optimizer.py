"""The student's optimizer, where its states live, and the schedule of its learning rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_kd.config.components import Component, ConfigError, instantiate, problem
from ds_kd.config.sections import LRScheduler
from ds_kd.errors import first_line

#: torch's optimizers with kernels that update everything in one pass, both on CPU and on CUDA.
_FUSED = {f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD")}
_CPU_ADAM, _FUSED_ADAM = (f"deepspeed.ops.adam.{n}" for n in ("DeepSpeedCPUAdam", "FusedAdam"))


def place_optimizer(component: Component, in_host: bool) -> Component:
    """The optimizer for states on an accelerator or in the host's memory.

    There torch's Adam and AdamW and DeepSpeed's FusedAdam become DeepSpeed's Adam for the host: the
    same arithmetic on vector instructions and all cores.

    Args:
        component: what the YAML names.
        in_host: whether `offload_optimizer` puts the states there.

    Raises:
        ConfigError: an optimizer that cannot work there.
    """
    key = f"{component.key}._target_"
    if not in_host:
        if component.name == _CPU_ADAM:
            hint = "write torch.optim.AdamW, or offload_optimizer in deepspeed.student"
            raise ConfigError([problem(key, _CPU_ADAM, "an optimizer of the accelerator", hint)])
        return component
    known = {  # → whether its weight decay is decoupled, and the default of that
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
    """As the YAML says; torch's one-pass kernels where it names neither kind and there are some.

    Args:
        component: from `placed`.
        parameters: the trained ones.
        named: what is taken where DeepSpeed cannot build its own in the place of torch's.

    Raises:
        ConfigError: arguments that it does not take.
        ValueError: what it refuses, or an operator that cannot be built.
    """
    chosen = {"fused", "foreach", "differentiable"} & set(component.kwargs)
    extra: dict[str, Any] = {"fused": True} if component.name in _FUSED and not chosen else {}
    extra["model_params" if component.name == _CPU_ADAM else "params"] = parameters
    try:
        return instantiate(component, **extra)
    except RuntimeError as error:  # DeepSpeed's, of an operator that it cannot build
        if component is named or not named.name.startswith("torch."):
            raise ValueError(first_line(error)) from error
    return build_optimizer(named, parameters, named)


def build_schedule(wanted: LRScheduler | None, total_steps: int) -> Callable[[Any], Any] | None:
    """What makes the learning-rate schedule of an optimizer; None keeps the rate as it is."""
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
