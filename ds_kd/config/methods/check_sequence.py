"""Check what splitting samples over ranks (`distributed.cp_size`) needs of the other keys."""

from __future__ import annotations

from typing import Any

from ds_kd.config.checks.weights import find_text_config, read_config
from ds_kd.config.components import problem
from ds_kd.config.names import COLLATER
from ds_kd.config.permissions import translate
from ds_kd.config.schema import RunConfig

KEY = "distributed.cp_size"
_HEADS = ("num_attention_heads", "n_head")  # their number in a config.json
#: Architectures that transformers computes without SDPA, or with a mask of their own; a run refuses
#: them when it has loaded them.
UNSPLIT = frozenset((
    "axk2", "bailing_hybrid", "bamba", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small",
    "bloom", "blt", "codegen", "deepseek_v32", "deepseek_v4", "doge", "dots3_note_text", "falcon",
    "falcon_h1", "falcon_mamba", "flint", "gemma2", "git", "glm_moe_dsa", "gpt_neo",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "granitemoehybrid",
    "hy_v4", "inkling2_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "llama4_text",
    "mamba", "mamba2", "mimo_v2_flash", "minimax", "mpt", "mvp", "nemotron_h", "olmo_hybrid",
    "openai-gpt", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "rwkv",
    "trocr", "vaultgemma", "xglm", "zamba", "zamba2", "zaya",
))  # fmt: skip
#: Kinds of layer whose tokens are joined around attention; others mix tokens in other ways.
_LAYERS = {"full_attention", "sliding_attention"}


def check_sequence(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` for each key that does not go with split samples."""
    size = cfg.distributed.cp_size or 1
    if cfg.distributed.sequence_parallel and size == 1:
        problems.append(
            "distributed.sequence_parallel: got true without a number of ranks that share a "
            f"sample; write {KEY}: 2, or false"
        )
    if size == 1:
        return

    # Attention that is only known when a model is loaded is checked by `models.probes.check_parts`.
    for model in filter(None, (cfg.model, cfg.teacher_model if cfg.loads_teacher else None)):
        given = model.kwargs.get("attn_implementation")
        if given not in (None, "sdpa"):
            problems.append(
                f"{model.key}.attn_implementation: {given} sees only a part of the tokens with "
                f"{KEY}: {size}; write sdpa, or remove {KEY}"
            )
        elif misfit := _find_misfit(read_config(model), size, is_asked=given is not None):
            key = f"{model.key}.pretrained_model_name_or_path"
            name = model.kwargs.get("pretrained_model_name_or_path")
            problems.append(problem(key, name, f"a model that {KEY}: {size} can split", misfit))
    for key, given in find_own_collaters(cfg):
        problems.append(
            f"{key}: what {given} returns cannot be split by {KEY}: {size}; remove one of the two "
            "keys"
        )


def _find_misfit(config: dict[str, Any], size: int, is_asked: bool) -> str:
    """Return why a model's samples cannot be split over `size` ranks, or an empty text.

    Args:
        config: the content of its config.json; may be empty.
        is_asked: the YAML asks for SDPA, which its architecture may not take by itself.
    """
    config = find_text_config(config)
    kind = config.get("model_type")
    if kind in UNSPLIT and not is_asked:
        how = "without SDPA, or with a mask of its own"
        return f"transformers computes its model_type {kind} {how}; remove {KEY}"
    heads = next((config[name] for name in _HEADS if isinstance(config.get(name), int)), None)
    if heads is not None and heads < size:
        return f"its attention has {heads} head(s), and each rank needs one; write {KEY}: {heads}"
    kinds = config.get("layer_types")
    others = sorted({*map(str, kinds)} - _LAYERS) if isinstance(kinds, list) else []
    return f"it has layers of type {', '.join(others)}; remove {KEY}" if others else ""


def find_own_collaters(cfg: RunConfig) -> list[tuple[str, str]]:
    """Return (key, name) of each `collate_fn` that is not the default one."""
    loaders = filter(None, (cfg.dataloader, cfg.validation_dataloader))
    named = [(f"{each.key}.collate_fn", each.kwargs.get("collate_fn")) for each in loaders]
    return [
        (key, str(given))
        for key, given in named
        if given is not None and translate(str(given)) != COLLATER
    ]
