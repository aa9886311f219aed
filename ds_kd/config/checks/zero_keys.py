"""The keys of a ZeRO file and the kinds of their values, as in DeepSpeed's own models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**63
_DTYPES = ("fp32", "fp16", "bf16")
#: Keys of zero_optimization → kind. Those of stage 3 have a second name that begins with `stage3_`.
_STAGE3 = {
    "prefetch_bucket_size": "size", "param_persistence_threshold": "size",
    "model_persistence_threshold": "size", "max_live_parameters": "size",
    "max_reuse_distance": "size", "gather_16bit_weights_on_model_save": "switch",
    "gather_fp16_weights_on_model_save": "switch", "module_granularity_threshold": "size",
    "use_all_reduce_for_fetch_params": "switch", "allgather_sequential": "switch",
}  # fmt: skip
ZERO: dict[str, Any] = {
    "stage": "size", "offload_param": "any", "offload_optimizer": "any",
    "reduce_bucket_size": "size", "allgather_bucket_size": "size", "sub_group_size": "size",
    "zero_hpz_partition_size": "size", "overlap_comm": "switch",
    "leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), "name or names"),
    "zenflow": {
        "topk_ratio": "share", "select_strategy": ("auto", "step", "epoch"),
        "select_interval": "any", "update_interval": "any", "overlap_step": "switch",
        "offload": "switch", "auto_ratio": "share", "full_warm_up_rounds": "size",
        "pt_reserved_cores_perc": "share", "steps_per_epoch": "size",
    },
    **dict.fromkeys((
        "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint",
        "cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload",
        "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment",
        "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
        "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
        "log_trace_cache_warnings", "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    ), "switch"),
    **_STAGE3, **{f"stage3_{name}": kind for name, kind in _STAGE3.items()},
}  # fmt: skip
_OFFLOAD = {
    "device": "any", "nvme_path": "text", "buffer_count": "size", "pin_memory": "switch",
}  # fmt: skip
OFFLOAD: dict[str, dict[str, Any]] = {
    "offload_param": {**_OFFLOAD, "buffer_size": "size", "max_in_cpu": "size"},
    "offload_optimizer": {
        **_OFFLOAD, "ratio": "share", "pipeline_read": "switch", "pipeline_write": "switch",
        "fast_init": "switch", "super_offload": "switch", "cpuadam_cores_perc": "share",
    },
}  # fmt: skip
#: Keys that may stand beside zero_optimization.
OTHERS: dict[str, Any] = {
    "zero_optimization": "mapping",
    "communication_data_type": _DTYPES,
    "seq_parallel_communication_data_type": _DTYPES,
    "zero_allow_untested_optimizer": "switch",
    "zero_force_ds_cpu_optimizer": "switch",
    "aio": {
        "block_size": "size", "queue_depth": "size", "intra_op_parallelism": "size",
        "single_submit": "switch", "overlap_events": "switch", "use_gds": "switch",
    },
    "comms_logger": {
        "enabled": "switch", "prof_all": "switch", "prof_ops": "names", "verbose": "switch",
        "debug": "switch",
    },
}  # fmt: skip
_WORDS = {
    "size": "a whole number ≥ 0 and below 2^63",
    "share": "a number from 0 to 1",
    "switch": "true or false",
    "text": "text",
    "mapping": "a mapping",
    "names": "a list of names",
    "name or names": "a name or a list of names",
}


def find_wrong_value(section: Mapping[Any, Any], known: Mapping[str, Any], prefix: str) -> str:
    """Return the problem of the first wrong key of a section, or an empty text.

    Args:
        known: key → kind: the name of a kind, a tuple of words, or the keys of a mapping.
        prefix: the beginning of the keys' names in the message.
    """
    for name, value in section.items():
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "DeepSpeed has no such key; remove it"
            return f"{prefix}{str(name)[:100]} is unknown; {hint}"
        kind = known[name]
        if value is None and kind not in ("size", "switch", "share"):
            continue
        if isinstance(kind, dict) and isinstance(value, dict):
            if wrong := find_wrong_value(value, kind, f"{prefix}{name}."):
                return wrong
        elif not _is_of_kind(value, kind) and not (value is None and name == "overlap_comm"):
            return f"{prefix}{name} is {quote(value)}, expected {_describe_kind(kind)}"
    return ""


def _is_of_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, str) and value.lower() in kind
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "size":  # 5e8 is a whole number too
        return is_number and 0 <= value < _LARGEST and value == int(value)
    if kind == "share":
        return is_number and 0 <= value <= 1
    if kind == "name or names" and isinstance(value, str):
        return True
    if kind in ("names", "name or names"):
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if isinstance(kind, dict):
        return False
    return kind == "any" or isinstance(value, {"switch": bool, "text": str, "mapping": dict}[kind])


def _describe_kind(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(kind)
    return _WORDS["mapping" if isinstance(kind, dict) else kind]


def quote(value: Any) -> str:
    """Return a value as a message quotes it: its beginning, on one line."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python may refuse to print it
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
