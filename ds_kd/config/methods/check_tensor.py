"""Check what cutting matrices over ranks (`distributed.tp_size`) needs of models and other keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_kd.config.components import Component
from ds_kd.config.schema import RunConfig
from ds_kd.errors import NotPlainFileError, read_plain_file

KEY = "distributed.tp_size"
_MAX_BYTES = 100_000_000
#: Architectures whose step with cut matrices was compared with plain transformers.
ARCHITECTURES = (
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gpt_neox", "granite", "helium", "hyperclovax", "jais2", "llama", "ministral",
    "ministral3", "mistral", "nanochat", "nemotron", "olmo", "phi", "qwen2", "qwen3", "seed_oss",
    "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
#: Keys of a configuration that count what is divided over ranks.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_tensor(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` for each key that does not go with cut matrices."""
    size = cfg.distributed.tp_size or 1
    if size == 1:
        return
    for component in filter(None, (cfg.model, cfg.teacher_model if cfg.loads_teacher else None)):
        config = _read_config(component)
        if config is not None and (misfit := find_misfit(config, size)):
            problems.append(f"{component.key}: {misfit}")
    together = f"does not go with {KEY}: {size}"
    if cfg.compile.enabled == "true":
        problems.append(f"compile.enabled: {together}; write false")
    if cfg.teacher.placement in (INT8, NVME):
        problems.append(
            f"teacher.placement: got {cfg.teacher.placement}, which {together}; write zero3, "
            "replicate or cpu"
        )
    for name in ("student", "teacher"):
        if (count := _count_copies(getattr(cfg.deepspeed, name))) > 1:
            problems.append(
                f"deepspeed.{name}: zero_hpz_partition_size: {count} {together}; remove it"
            )
    if cfg.peft is not None:
        problems.append(
            f"peft: {together}, as DeepSpeed cannot cut the maps that an adapter wraps; remove one "
            "of them"
        )
    if cfg.teacher.fill:
        problems.append(
            f"teacher.fill: {together}; fill the cache in a run without {KEY}, and write false"
        )


def find_misfit(config: Mapping[str, Any], size: int) -> str:
    """Return why a model cannot be cut over `size` ranks, or an empty text.

    Args:
        config: the content of its config.json.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        return (
            f"{KEY}: {size} cannot cut {kind}, expected one of {', '.join(ARCHITECTURES)}; remove "
            f"{KEY}: ZeRO-3 shards any model"
        )
    for key in _DIVIDED:
        count = config.get(key)
        if isinstance(count, int) and count % size:
            return f"{KEY}: {size} does not divide its {key} {count}; write a divisor"
    return ""


def _read_config(component: Component) -> dict[str, Any] | None:
    """Return the configuration of a local model, or None where it cannot be told here."""
    name = component.kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or component.kwargs.get("gguf_file") is not None:
        return None
    path = Path(name, str(component.kwargs.get("subfolder") or ""), "config.json")
    try:
        found = json.loads(read_plain_file(path, _MAX_BYTES))
    except (OSError, ValueError, NotPlainFileError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
