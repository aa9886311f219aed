"""Read and check ZeRO files: the keys that they may hold, and those that the YAML decides."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from ds_kd.config.checks.zero_keys import OFFLOAD, OTHERS, ZERO, find_wrong_value, quote
from ds_kd.config.names import CPU, REPLICATE
from ds_kd.errors import first_line
from ds_kd.files import NotPlainFileError, read_plain_file

#: Keys that a ZeRO file may hold.
ZERO_FILE_KEYS = {
    "zero_optimization",
    "aio",
    "communication_data_type",
    "comms_logger",
    "seq_parallel_communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
#: Keys of DeepSpeed that the YAML decides → the YAML's key.
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
_MAX_BYTES = 10_000_000
_DEVICES = ("cpu", "nvme", "none")
_PLAIN_ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
}


def load_zero_config(
    source: str | dict | None, key: str, stages: tuple[int, ...] = (3,)
) -> dict[str, Any]:
    """Return the checked content of a ZeRO file: a path, a mapping, or None for plain ZeRO-3.

    Raises:
        ValueError: the file cannot be read, its stage is not offered, or a key belongs to the YAML
            or is not about ZeRO.
    """
    where = f"{key}: {source:.300}" if isinstance(source, str) else key
    if source is None:
        return copy.deepcopy(_PLAIN_ZERO3)
    if isinstance(source, str):
        source = _read_file(source, where)
    if not isinstance(source, dict):
        raise ValueError(f"{where}: expected a mapping with zero_optimization")
    try:
        config = copy.deepcopy(source)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply; give a DeepSpeed JSON file") from None

    # `auto` stands for DeepSpeed's own default, as in files written for other trainers.
    for name in list(config):
        if config[name] == "auto":
            del config[name]
        elif name in FROM_YAML:
            raise ValueError(
                f"{where}: {_describe_key(name, config[name])} belongs to the YAML "
                f"({FROM_YAML[name]}); remove it from the ZeRO file"
            )
        elif name not in ZERO_FILE_KEYS:
            raise ValueError(
                f"{where}: {quote(name)} is not a ZeRO, offload or communication key; remove it"
            )

    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"{where}: zero_optimization must be a mapping, got {quote(zero)}")
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]
    stage = zero.setdefault("stage", 3)
    if type(stage) is not int or stage not in stages:
        raise ValueError(
            f"{where}: zero_optimization.stage is {quote(stage)}, expected "
            f"{' or '.join(map(str, stages))}"
        )
    if wrong := find_wrong_value(zero, ZERO, "") or find_wrong_value(config, OTHERS, ""):
        raise ValueError(f"{where}: {wrong}")
    _check_offload(zero, where)
    return config


def _read_file(path: str, where: str) -> Any:
    try:
        return json.loads(read_plain_file(path, _MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{where}: cannot be read ({error.strerror}); give a path to a DeepSpeed JSON file or "
            f"an inline mapping"
        ) from None
    except NotPlainFileError as error:
        raise ValueError(f"{where}: {error}; give a DeepSpeed JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {first_line(error)}") from None


def _check_offload(zero: dict[str, Any], where: str) -> None:
    for part in ("offload_param", "offload_optimizer"):
        offload = zero.get(part)
        if offload is None:
            continue
        if not isinstance(offload, dict) or offload.get("device") not in _DEVICES:
            raise ValueError(
                f"{where}: {part} is {quote(offload)}, expected a mapping whose device is "
                f"{' or '.join(_DEVICES)}"
            )
        if wrong := find_wrong_value(offload, OFFLOAD[part], f"{part}."):
            raise ValueError(f"{where}: {wrong}")
        path = offload.get("nvme_path")
        is_there = isinstance(path, str) and os.path.isdir(path)  # of any length
        if offload["device"] == "nvme" and not is_there:
            raise ValueError(
                f"{where}: {part}.nvme_path is {quote(path)}, expected a directory on an NVMe disk"
            )


def _describe_key(name: str, value: Any) -> str:
    """Return a key with its plain value, or a section's name alone, as it may hold secrets."""
    return name if isinstance(value, (dict, list)) else f"{name}={quote(value)}"


def offload_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ZeRO configuration with parameters in the host's memory, unless it already has an
    `offload_param`."""
    zero = config["zero_optimization"]
    there = (zero.get("offload_param") or {}).get("device", "none") != "none"
    host = {"device": "cpu", "pin_memory": True}
    return config if there else {**config, "zero_optimization": {**zero, "offload_param": host}}


def place_teacher(given: Any, placement: str | None, offloads: bool) -> dict[str, Any]:
    """Return the ZeRO configuration of a teacher.

    Args:
        given: `deepspeed.teacher`, as a path or a mapping, or None.
        placement: `teacher.placement`, or None; int8 and auto are plain ZeRO-3 here.
        offloads: `offload_teacher_model`.

    Raises:
        ValueError: as `load_zero_config`.
    """
    config = load_zero_config(given, "deepspeed.teacher", (0, 3))
    if placement == REPLICATE:
        return {**config, "zero_optimization": {"stage": 0}}
    return offload_parameters(config) if offloads or placement == CPU else config


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Return whether the optimizer's states are offloaded from the accelerator."""
    part = config["zero_optimization"].get("offload_optimizer") or {}
    return part.get("device") in ("cpu", "nvme")
