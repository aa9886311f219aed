"""The two DeepSpeed engines.

The student trains in ZeRO-3: parameters, gradients and optimizer states sharded over the ranks. The
teacher runs in ZeRO-Inference: stage 3 *without* an optimizer, so that only its parameters exist,
sharded over the same ranks and gathered layer by layer. Both are plain `DeepSpeedEngine`s.

With `distributed.tp_size` both cut the matrices of their layers too (`tensor`).

The ZeRO files only place tensors. Everything that changes the mathematics (batch, accumulation,
dtype, clipping) comes from the YAML and is written into the engine's configuration here. Clipping
is always written, as DeepSpeed clips gradients at 1.0 by default.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ds_kd.parallel import tensor
from ds_kd.parallel.linear import replace_linear

#: DeepSpeed's `reduce_bucket_size`, in weights.
REDUCE_BUCKET = 500_000_000
#: ZeRO-3 updates flat one-dimensional shards, on which only element-wise optimizers are correct.
#: Adagrad is one of them, but DeepSpeed replaces it by another that follows no schedule.
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


#: The fp32 numbers that an optimizer keeps for each weight, by default 2. Each of the arguments in
#: `_ONE_MORE` adds one.
_OPTIMIZER_NUMBERS = {"SGD": 0, "RMSprop": 1}
_ONE_MORE = {"SGD": ("momentum",), "RMSprop": ("momentum", "centered")}


def engine_config(
    zero: dict[str, Any],
    dtype: torch.dtype,
    micro_batch_size: int,
    accumulation: int = 1,
    clip_grad_norm: float | None = None,
) -> dict[str, Any]:
    """Return the whole DeepSpeed configuration: the ZeRO file and the settings of the YAML."""
    return {
        **zero,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # engine.step() is called once per optimizer step. The last step of an epoch may have fewer
        # micro-batches than the others.
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        # DeepSpeed's samples per second have the host wait for the device at every forward.
        "timers": {"throughput": {"enabled": False}},
    }


@contextmanager
def zero3_init(zero_config: dict[str, Any]) -> Iterator[None]:
    """Make `from_pretrained` shard a model while it loads, inside this block only.

    transformers keeps one DeepSpeed configuration in a global weak reference, so each of two models
    with two configurations is loaded in a block of its own.
    """
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if zero_config["zero_optimization"]["stage"] != 3:
        yield
        return
    # DeepSpeed makes the groups of `zero_hpz_partition_size` while a model is loaded, and refuses
    # to make those of a second model as long as it knows the first one's.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    keep_alive = HfDeepSpeedConfig(tensor.without_cuts(zero_config))
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()
        replace_linear()


@contextmanager
def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gather the whole values of sharded and cut parameters (a collective)."""
    import deepspeed

    with (
        deepspeed.zero.GatheredParameters(parameters, modifier_rank=None),
        tensor.join(parameters),
    ):
        yield


def is_quantized(parameter: Any) -> bool:
    """Return whether DeepSpeed keeps a weight in 8 bits."""
    return bool(getattr(parameter, "weight_quantized", False))


def read_weight(parameter: Any) -> torch.Tensor:
    """Return the numbers of a gathered weight, also of one that is kept in 8 bits."""
    if not is_quantized(parameter):
        return parameter
    numbers, scales, least = parameter.deconcat(parameter)
    return parameter.dequantizer.dequantize(numbers.view(torch.uint8), scales, least)


def build_student(
    module: nn.Module,
    config: dict[str, Any],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Any:
    """Build the training engine around `module`.

    Args:
        module: the student, loaded under `engines.zero3_init(config)`.
        config: from `engine_config`.
        optimizer: called with the trainable parameters.
        lr_scheduler: called with the optimizer; the engine steps its result after each optimizer
            step.

    Raises:
        ValueError: the optimizer is not element-wise.
    """
    import deepspeed

    _gather_by_layer(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    config = size_bucket(config, sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters))
    made = optimizer(parameters)
    if type(made).__name__ not in ELEMENTWISE:
        raise ValueError(
            f"optimizer: {type(made).__name__} looks at whole matrices, and ZeRO-3 gives it "
            f"flat shards: its steps would be wrong. Use one of {', '.join(sorted(ELEMENTWISE))}."
        )
    tensor.forget_groups(config)
    with tensor.show_maps():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=made, lr_scheduler=lr_scheduler, config=config
        )
    tensor.prepare(engine)
    _decide_anew_with_each_trace(engine)
    return engine


def size_bucket(config: dict[str, Any], trained: int) -> dict[str, Any]:
    """Return an engine's configuration with a bucket for the gradients of so many weights.

    DeepSpeed allocates the whole bucket, in which the gradients of a backward pass are exchanged.
    If the ZeRO file names no `reduce_bucket_size`, it is `REDUCE_BUCKET`, and never larger than all
    gradients together. With `tp_size` the weights are cut later, so that it may be larger than the
    gradients of this rank.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3 or "reduce_bucket_size" in zero:
        return config
    size = min(REDUCE_BUCKET, max(1, trained))
    return {**config, "zero_optimization": {**zero, "reduce_bucket_size": size}}


def build_teacher(module: nn.Module, config: dict[str, Any]) -> Any:
    """Build the inference engine around `module`: parameters only, in eval mode, no gradient."""
    import deepspeed

    _gather_by_layer(module)
    with tensor.hide_groups(config):
        engine, *_ = deepspeed.initialize(model=module, config=config)
    tensor.prepare(engine)
    _decide_anew_with_each_trace(engine)
    engine.eval()
    return engine


def _gather_by_layer(module: nn.Module) -> None:
    """Make ZeRO-3 gather whole transformer layers and not each linear map in them.

    This needs about a twelfth of the hooks and collectives. In a mixture of experts all ranks then
    gather the same parameters, although they route tokens to different experts.
    """
    from deepspeed.utils import set_z3_leaf_modules

    names = getattr(getattr(module, "model", None), "_no_split_modules", None) or ()
    kinds = {type(part) for part in module.modules() if type(part).__name__ in names}
    if kinds:
        set_z3_leaf_modules(module, list(kinds))


def _decide_anew_with_each_trace(engine: Any) -> None:
    """Make ZeRO-3 decide anew which layers stay whole when modules run in another order.

    DeepSpeed records the order of a pass, and keeps weights whole that come again soon, such as a
    layer's between forward and backward. It remembers what a module lets go of at each place of the
    order, also after it has given that order up. The probes of a model have no backward pass: after
    them a run would let go of every layer in forward and gather it again for backward.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if not hasattr(offload, "get_param_coordinator"):  # nothing is sharded
        return
    coordinator = offload.get_param_coordinator()
    decide = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    # The decorator around the cache does not name it.
    remembered, give_up = (
        inspect.getclosurevars(decide).nonlocals["func"],
        coordinator._invalidate_trace,
    )

    def give_up_and_forget() -> None:
        remembered.cache_clear()
        give_up()

    coordinator._invalidate_trace = give_up_and_forget


def read_gradient_norm(engine: Any) -> float:
    """Return the norm of the last step's gradient, NaN for one that is not finite: DeepSpeed skips
    such a step and keeps the norm of the step before."""
    if getattr(engine.optimizer, "overflow", False):
        return math.nan
    return float(engine.get_global_grad_norm() or 0.0)


def optimizer_numbers(name: str, arguments: dict[str, Any]) -> int:
    """Return how many fp32 numbers an optimizer of this class keeps for each weight."""
    more = _ONE_MORE.get(name, ("amsgrad",))
    return _OPTIMIZER_NUMBERS.get(name, 2) + sum(bool(arguments.get(part)) for part in more)
