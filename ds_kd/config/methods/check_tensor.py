"""Check what cutting matrices over ranks (`distributed.tp_size`) needs of models and other keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ds_kd.config.checks.weights import find_text_config, read_config
from ds_kd.config.checks.zero_file import load_zero_config
from ds_kd.config.components import problem
from ds_kd.config.names import AUTO, INT8
from ds_kd.config.schema import RunConfig

KEY, OF_TEACHER = "distributed.tp_size", "teacher_distributed.tp_size"
#: The remedy for a model that cannot be cut.
REMEDY = f"remove {KEY}, as ZeRO-3 shards any model"
REMEDY_OF_TEACHER = f"write {OF_TEACHER}: 1, which leaves it whole, or remove {KEY}"
#: Architectures whose step with cut matrices was compared with plain transformers.
ARCHITECTURES = (
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gpt_neox", "granite", "helium", "hyperclovax", "jais2", "llama", "ministral",
    "ministral3", "mistral", "nanochat", "nemotron", "olmo", "phi", "qwen2", "qwen3", "seed_oss",
    "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
#: Architectures with a matrix that is several maps, one below the other: a part of its rows would
#: be a part of some maps and nothing of others.
_JOINED = {
    "bloom": "query_key_value", "codegen": "qkv_proj", "falcon": "query_key_value",
    "glm": "gate_up_proj", "glm4": "gate_up_proj", "gpt2": "c_attn", "gpt_bigcode": "c_attn",
    "gpt_neox_japanese": "query_key_value", "mpt": "Wqkv", "openai-gpt": "c_attn",
    "persimmon": "query_key_value", "phi3": "qkv_proj",
}  # fmt: skip
#: Keys of a configuration that count experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: Keys of a configuration that count what is divided over ranks.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_tensor(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` for each key that does not go with cut matrices."""
    size, of_teacher = cfg.distributed.tp_size or 1, cfg.teacher_tp_size
    if of_teacher not in (1, size):
        expected = "1" if size == 1 else f"1, or {size} as {KEY} is"
        hint = (
            f"{KEY} cuts both models, as the ranks that share matrices share samples too: write "
            f"{KEY}: {of_teacher}, or remove this key"
        )
        problems.append(problem(OF_TEACHER, of_teacher, expected, hint))
    if size == 1:
        return
    is_cut = cfg.loads_teacher and of_teacher > 1
    cut = [*filter(None, (cfg.model, cfg.teacher_model if is_cut else None))]
    configs = [find_text_config(read_config(component)) for component in cut]
    for component, config in zip(cut, configs, strict=True):
        parts = cfg.distributed.cp_size or 1
        remedy = REMEDY if component is cfg.model else REMEDY_OF_TEACHER
        if config and (misfit := find_misfit(config, size, parts, remedy, configs)):
            key = f"{component.key}.pretrained_model_name_or_path"
            name = component.kwargs.get("pretrained_model_name_or_path")
            problems.append(problem(key, name, f"a model that {KEY}: {size} can cut", misfit))

    # These keys wrap, compile, pack or copy whole matrices.
    together = f"does not go with {KEY}: {size}"
    if cfg.compile.enabled == "true":
        problems.append(f"compile.enabled: {together}; write false")
    if cfg.teacher.placement in (INT8, AUTO):
        problems.append(
            f"teacher.placement: got {cfg.teacher.placement}, which {together}; write zero3, "
            "replicate or cpu"
        )
    for name in ("student", "teacher"):
        if (count := count_copies(getattr(cfg.deepspeed, name))) > 1:
            problems.append(
                f"deepspeed.{name}: zero_hpz_partition_size: {count} {together}; remove it"
            )
    if cfg.peft is not None and cfg.peft.use_dora:
        problems.append(f"peft.use_dora: {together}, as it measures whole rows; write false")
    if cfg.teacher.fill:
        problems.append(
            f"teacher.fill: {together}; write false, and let launch/cache_teacher.py fill the cache"
        )


def note_on_machines(cfg: RunConfig) -> list[str]:
    """Return a note if SLURM would lay ranks that exchange activations over several machines."""
    together = cfg.distributed.ranks_per_sample
    if cfg.slurm is None or cfg.slurm.nodes == 1 or cfg.slurm.ntasks_per_node % together == 0:
        return []
    return [
        f"slurm.ntasks_per_node: the {cfg.slurm.ntasks_per_node} rank(s) of a machine are no whole "
        f"groups of {together} that share samples; these exchange activations over the network"
    ]


def count_copies(given: Any) -> int:
    """Return the ranks that share a second copy of the weights by a ZeRO file, 1 if there is none;
    what is wrong with the file is told elsewhere."""
    try:
        zero = load_zero_config(given, "", (0, 3))["zero_optimization"]
    except ValueError:
        return 1
    return max(1, int(zero.get("zero_hpz_partition_size", 1)))


def find_misfit(
    config: Mapping[str, Any],
    size: int,
    parts: int = 1,
    remedy: str = REMEDY,
    together: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return why a model cannot be cut over `size` ranks, or an empty text.

    Args:
        config: the content of its config.json, or its `text_config`.
        parts: ranks over which samples are split, each of which needs a head of its own.
        remedy: what to do where no number of ranks fits.
        together: of all models that are cut, which have one number of ranks.
    """
    kind = config.get("model_type")
    if kind is None:  # of a `text_config` that leaves it to the class, which a run knows
        return ""
    if kind not in ARCHITECTURES:
        return f"{_tell_why(config)}; {remedy}"
    counts = _count_divided(config)
    odd = next((key for key, count in counts.items() if count % size), None)
    if odd is None:
        heads = counts.get(_DIVIDED[0], size * parts)
        few = f"its {_DIVIDED[0]} is {heads}, and {size} × cp_size {parts} ranks need one each"
        each = heads // size
        write = f"write distributed.cp_size: {each}" if each > 1 else "remove distributed.cp_size"
        return f"{few}; {write}" if heads < size * parts else ""
    others = [count for other in together for count in _count_divided(other).values()]
    most = math.gcd(*counts.values(), *others)
    return f"its {odd} is {counts[odd]}; " + (f"write {KEY}: {most}" if most > 1 else remedy)


def _count_divided(config: Mapping[str, Any]) -> dict[str, int]:
    """Return what of a model is divided over ranks, and its number."""
    return {key: count for key in _DIVIDED if isinstance(count := config.get(key), int)}


def _tell_why(config: Mapping[str, Any]) -> str:
    """Return why a model of another architecture is not cut."""
    kind = config.get("model_type")
    for name in _EXPERTS:
        if isinstance(count := config.get(name), int) and count > 1:
            return f"its {name} is {count}, and experts are not cut"
    if (joined := _JOINED.get(str(kind))) is not None:
        return f"{joined} of its model_type {kind} holds several maps in one matrix"
    return f"its model_type {kind} is none of {', '.join(ARCHITECTURES)}"
