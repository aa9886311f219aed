"""The two DeepSpeed engines.

The student trains in ZeRO-3: parameters, gradients and optimizer states sharded over the ranks. The
teacher runs in
ZeRO-Inference: stage 3 *without* an optimizer, so that only its parameters exist, sharded over the
same ranks and gathered layer
by layer. Both are plain `DeepSpeedEngine`s.

The ZeRO files say where tensors live. Everything that changes the mathematics (batch, accumulation,
dtype, clipping) comes from the
YAML and is written into the engine's configuration here, explicitly: DeepSpeed's own default clips
gradients at 1.0.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: What a ZeRO file may hold.
ZERO_FILE_KEYS = {
    "zero_optimization",
    "aio",
    "communication_data_type",
    "comms_logger",
    "seq_parallel_communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
#: What the YAML decides, and where.
FROM_YAML = {
    "train_batch_size": "step_scheduler.global_batch_size",
    "train_micro_batch_size_per_gpu": "step_scheduler.local_batch_size",
    "gradient_accumulation_steps": "step_scheduler.global_batch_size",
    "gradient_clipping": "clip_grad_norm",
    "bf16": "model.torch_dtype",
    "fp16": "model.torch_dtype",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
#: ZeRO-3 updates flat one-dimensional shards: only optimizers that treat every element alone are
#: right on them.
ELEMENTWISE = {
    "Adam",
    "AdamW",
    "SGD",
    "NAdam",
    "RAdam",
    "Adagrad",
    "Adamax",
    "RMSprop",
    "FusedAdam",
    "DeepSpeedCPUAdam",
}
# Chosen for the teacher where its file does not say: gather ahead, keep small parameters whole.
_PLAIN_ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
}


def load_zero_config(
    source: str | dict | None, key: str, stages: tuple[int, ...] = (3,)
) -> dict[str, Any]:
    """A ZeRO file (path, inline mapping, or None for plain ZeRO-3) → its checked content.

    Raises:
        ValueError: unreadable file, a stage that is not offered, a key that the YAML decides, or
            one that is not about ZeRO.
    """
    where = f"{key}: {source}" if isinstance(source, str) else key
    if source is None:
        return copy.deepcopy(_PLAIN_ZERO3)
    if isinstance(source, str):
        try:
            source = json.loads(Path(source).read_text())
        except OSError as error:
            raise ValueError(
                f"{where}: cannot be read ({error.strerror}); give a path to a DeepSpeed JSON "
                f"file or an inline mapping"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(source, dict):
        raise ValueError(f"{where}: expected a mapping with zero_optimization")
    config = copy.deepcopy(source)
    for name in list(config):
        if config[name] == "auto":
            del config[name]
        elif name in FROM_YAML:
            raise ValueError(
                f"{where}: {name}={config[name]!r} belongs to the YAML ({FROM_YAML[name]}); "
                f"remove it from the ZeRO file"
            )
        elif name not in ZERO_FILE_KEYS:
            raise ValueError(
                f"{where}: {name!r} is not a ZeRO, offload or communication key; remove it"
            )
    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"{where}: zero_optimization must be a mapping, got {zero!r}")
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]
    stage = zero.setdefault("stage", 3)
    if stage not in stages:
        raise ValueError(
            f"{where}: zero_optimization.stage is {stage!r}, expected "
            f"{' or '.join(map(str, stages))}"
        )
    return config


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


def build_student(
    module: nn.Module,
    config: dict[str, Any],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Any:
    """The training engine around `module`.

    Args:
        module: the student, loaded under `models.zero3_init(config)`.
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
            f"flat shards: its steps would be "
            f"wrong. Use one of {', '.join(sorted(ELEMENTWISE))}."
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
