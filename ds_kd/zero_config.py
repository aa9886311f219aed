"""ZeRO files: what they may hold, and what the YAML decides instead of them."""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

from ds_kd.errors import NotPlainFileError, first_line, read_plain_file

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
_MAX_BYTES = 10_000_000
_DEVICES = ("cpu", "nvme", "none")
#: Of zero_optimization. Some have a second name with `stage3_` in front.
_STAGE3_KEYS = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
    "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
    "gather_fp16_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
_ZERO_KEYS = (
    "stage", "offload_param", "offload_optimizer", "reduce_bucket_size", "allgather_bucket_size",
    "contiguous_gradients", "overlap_comm", "reduce_scatter", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "allgather_partitions", "compute_grad_norm",
    "load_from_fp32_weights", "elastic_checkpoint", "zenflow", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "cpu_offload", "ignore_unused_parameters", "legacy_stage1",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
    "mics_shard_size", "mics_hierarchical_params_gather", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings",
    "enable_sanity_checks", "leaf_module",
    *_STAGE3_KEYS, *(f"stage3_{name}" for name in _STAGE3_KEYS),
)  # fmt: skip
_OFFLOAD_KEYS = (
    "device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "ratio",
    "pipeline_read", "pipeline_write", "fast_init", "super_offload", "cpuadam_cores_perc",
)  # fmt: skip
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
        source = _read(source, where)
    if not isinstance(source, dict):
        raise ValueError(f"{where}: expected a mapping with zero_optimization")
    config = copy.deepcopy(source)
    for name in list(config):
        if config[name] == "auto":
            del config[name]
        elif name in FROM_YAML:
            raise ValueError(
                f"{where}: {_shown(name, config[name])} belongs to the YAML ({FROM_YAML[name]}); "
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
    if type(stage) is not int or stage not in stages:
        raise ValueError(
            f"{where}: zero_optimization.stage is {stage!r}, expected "
            f"{' or '.join(map(str, stages))}"
        )
    _check_numbers(zero, where)
    _check_offload(zero, where)
    return config


def _read(path: str, where: str) -> Any:
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
                f"{where}: {part} is {offload!r}, expected a mapping whose device is "
                f"{' or '.join(_DEVICES)}"
            )
        _check_names(offload, _OFFLOAD_KEYS, f"{where}: {part}")
        path = offload.get("nvme_path")
        is_there = isinstance(path, str) and Path(path).is_dir()
        if offload["device"] == "nvme" and not is_there:
            raise ValueError(
                f"{where}: {part}.nvme_path is {path!r}, expected a directory on an NVMe disk"
            )


def _check_names(section: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in section:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "DeepSpeed has no such key; remove it"
            raise ValueError(f"{where}: {name} is unknown; {hint}")


def _shown(name: str, value: Any) -> str:
    """A key with its plain value; a section may hold secrets."""
    return name if isinstance(value, (dict, list)) else f"{name}={value!r}"


def _check_numbers(zero: dict[str, Any], where: str) -> None:
    """Misspelt keys that would be ignored in silence, and sizes that are none."""
    _check_names(zero, _ZERO_KEYS, where)
    for name, value in zero.items():
        is_size = name.endswith(("_size", "_distance", "_parameters", "_threshold"))
        if not is_size or name == "mics_shard_size":  # -1 switches that one off
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{where}: {name} is {value!r}, expected a number ≥ 0")


def offloaded(config: dict[str, Any]) -> dict[str, Any]:
    """The same ZeRO configuration with parameters kept in the host's memory, unless it says where
    itself."""
    zero = config["zero_optimization"]
    there = (zero.get("offload_param") or {}).get("device", "none") != "none"
    host = {"device": "cpu", "pin_memory": True}
    return config if there else {**config, "zero_optimization": {**zero, "offload_param": host}}


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether optimizer states live outside the accelerator."""
    part = config["zero_optimization"].get("offload_optimizer") or {}
    return part.get("device") in ("cpu", "nvme")
