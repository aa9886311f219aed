"""An optimizer's settings and states: what a resumed run takes from its YAML, and what it
must find."""

from __future__ import annotations

from typing import Any

import torch

#: Which kernel computes: no matter of the result, and loaded states lie where theirs wants them.
_KERNELS = {"fused", "foreach", "capturable", "differentiable"}


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
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
    """Give a loaded optimizer the hyper-parameters of the present run, and the learning rate that
    its schedule has for the coming step.

    Args:
        optimizer: loaded, with the settings of the run that saved it.
        settings: from `settings_of`, before it was loaded.
        scheduler: the present run's `LambdaLR`, if any.
        steps: optimizer steps that have been applied.
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
    """Return the names of the tensors that this optimizer cannot go on without."""
    always = {
        "SGD": set[str](),  # makes its momentum when it is missing
        "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
        "Adamax": {"exp_avg", "exp_inf"},
        "RMSprop": {"square_avg"},
    }
    names = always.get(type(optimizer).__name__, {"exp_avg", "exp_avg_sq"})
    optional = {"amsgrad": "max_exp_avg_sq"}
    if type(optimizer).__name__ == "RMSprop":
        optional = {"momentum": "momentum_buffer", "centered": "grad_avg"}
    return names | {state for name, state in optional.items() if optimizer.defaults.get(name)}
