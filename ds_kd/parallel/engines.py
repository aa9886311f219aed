"""The two DeepSpeed engines.

The student trains in ZeRO-3: parameters, gradients and optimizer states sharded over the ranks. The
teacher runs in ZeRO-Inference: stage 3 *without* an optimizer, so that only its parameters exist,
sharded over the same ranks and gathered layer by layer. Both are plain `DeepSpeedEngine`s.

The ZeRO files say where tensors live. Everything that changes the mathematics (batch, accumulation,
dtype, clipping) comes from the YAML and is written into the engine's configuration here,
explicitly: DeepSpeed's own default clips gradients at 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: ZeRO-3 updates flat one-dimensional shards: only optimizers that treat every element alone are
#: right on them. Adagrad is one, but DeepSpeed replaces it by another that follows no schedule.
ELEMENTWISE = {
    "Adam",
    "AdamW",
    "SGD",
    "NAdam",
    "RAdam",
    "Adamax",
    "RMSprop",
    "FusedAdam",
    "DeepSpeedCPUAdam",
}


#: fp32 numbers that an optimizer keeps for every weight; 2 where not listed. Some of its arguments
#: each ask for one more.
_OPTIMIZER_NUMBERS = {"SGD": 0, "RMSprop": 1}
_ONE_MORE = {"SGD": ("momentum",), "RMSprop": ("momentum", "centered")}


def engine_config(
    zero: dict[str, Any],
    dtype: torch.dtype,
    micro_batch_size: int,
    accumulation: int = 1,
    clip_grad_norm: float | None = None,
) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the ZeRO file plus what the YAML decides."""
    return {
        **zero,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # One engine.step() per optimizer step, however many micro-batches it had (the last of an
        # epoch may have fewer).
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


@contextmanager
def zero3_init(zero_config: dict[str, Any]) -> Iterator[None]:
    """Make `from_pretrained` shard the model as it loads; nothing of it outlives the block.

    transformers keeps the DeepSpeed configuration in a module-wide weak reference where the last
    one created wins; two models with two configurations must therefore each be loaded inside a
    block of their own.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if zero_config["zero_optimization"]["stage"] != 3:
        yield
        return
    keep_alive = HfDeepSpeedConfig(zero_config)
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


@contextmanager
def gather(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """The whole values of ZeRO-3 sharded parameters (a collective: every rank enters and
    leaves)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield


def build_student(
    module: nn.Module,
    config: dict[str, Any],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Any:
    """The training engine around `module`.

    Args:
        module: the student, loaded under `engines.zero3_init(config)`.
        config: from `engine_config`.
        optimizer: called with the trainable parameters.
        lr_scheduler: called with the optimizer; stepped by the engine once per optimizer step.

    Raises:
        ValueError: an optimizer that is not element-wise.
    """
    import deepspeed

    _gather_by_layer(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    made = optimizer(parameters)
    if type(made).__name__ not in ELEMENTWISE:
        raise ValueError(
            f"optimizer: {type(made).__name__} looks at whole matrices, and ZeRO-3 gives it "
            f"flat shards: its steps would be wrong. Use one of {', '.join(sorted(ELEMENTWISE))}."
        )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=made, lr_scheduler=lr_scheduler, config=config
    )
    return engine


def build_teacher(module: nn.Module, config: dict[str, Any]) -> Any:
    """The inference engine around `module`: parameters only, eval mode, no gradient."""
    import deepspeed

    _gather_by_layer(module)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def _gather_by_layer(module: nn.Module) -> None:
    """Let ZeRO-3 gather whole transformer layers instead of every linear map in them: a dozen times
    fewer hooks and collectives, and in a mixture of experts the same ones on every rank, whichever
    experts are asked."""
    from deepspeed.utils import set_z3_leaf_modules

    names = getattr(getattr(module, "model", None), "_no_split_modules", None) or ()
    kinds = {type(part) for part in module.modules() if type(part).__name__ in names}
    if kinds:
        set_z3_leaf_modules(module, list(kinds))


def read_gradient_norm(engine: Any) -> float:
    """Return the norm of the last step's gradient, NaN for one that is not finite: DeepSpeed skips
    such a step and keeps the norm of the step before."""
    if getattr(engine.optimizer, "overflow", False):
        return math.nan
    return float(engine.get_global_grad_norm() or 0.0)


def optimizer_numbers(name: str, arguments: dict[str, Any]) -> int:
    """fp32 numbers that an optimizer of this class keeps for every weight."""
    more = _ONE_MORE.get(name, ("amsgrad",))
    return _OPTIMIZER_NUMBERS.get(name, 2) + sum(bool(arguments.get(part)) for part in more)
