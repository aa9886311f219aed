"""Apply a run's optimizer settings to loaded states, and name the states that must be there."""

from __future__ import annotations

from typing import Any

import torch

#: Settings that choose kernels, which do not change results.
_KERNELS = {"fused", "foreach", "capturable", "differentiable"}


def read_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of every parameter group (lr, betas, weight decay …), by name."""
    names = (optimizer.defaults.keys() | {"initial_lr"}) - _KERNELS
    return [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]


def apply_settings(
    optimizer: torch.optim.Optimizer,
    settings: list[dict[str, Any]],
    scheduler: Any | None,
    steps: int,
) -> None:
    """Give a loaded optimizer the hyper-parameters of this run, and the schedule's learning rate
    for the next step.

    Args:
        optimizer: the loaded optimizer, with the settings of the run that saved it.
        settings: the result of `read_settings` before loading.
        scheduler: this run's `LambdaLR`, if any.
        steps: number of optimizer steps that were applied.
    """
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    if scheduler is None:
        return

    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(steps) for base, factor in pairs]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def states_of(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of the state tensors that an optimizer needs to resume."""
    always = {
        "SGD": set[str](),  # it creates a missing momentum
        "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
        "Adamax": {"exp_avg", "exp_inf"},
        "RMSprop": {"square_avg"},
    }
    names = always.get(type(optimizer).__name__, {"exp_avg", "exp_avg_sq"})
    optional = {"amsgrad": "max_exp_avg_sq"}
    if type(optimizer).__name__ == "RMSprop":
        optional = {"momentum": "momentum_buffer", "centered": "grad_avg"}
    return names | {state for name, state in optional.items() if optimizer.defaults.get(name)}
