"""Tiny random models of every causal architecture that transformers knows."""

from __future__ import annotations

from typing import Any

import torch

from tests import tiny

_NO_DROPOUT = dict.fromkeys(
    [
        *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout"),
        *("embd_pdrop", "attn_pdrop", "resid_pdrop", "emb_pdrop", "layerdrop", "resid_dropout"),
        *(
            "residual_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "attention_dropout_prob",
        ),
    ],
    0.0,
)
#: Set in a configuration where it has them.
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "hidden_size_global": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 32,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Encoders and decoders whose decoder alone is meant.
    **{f"{part}_layers": 2 for part in ("encoder", "decoder", "num_encoder", "num_decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    # State-space and linear attention layers.
    "mamba_n_heads": 8,
    "n_mamba_heads": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "state_size": 8,
    **{f"linear_{part}_head_dim": 8 for part in ("key", "value")},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Images and sound, which no sample here has.
    "image_size": 16,
    "patch_size": 4,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    # Checkpointed layers recompute in training alone, where dropout must not differ.
    **_NO_DROPOUT,
}
#: Latent attention: every head has its own key, in two parts.
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "index_topk": 4,  # fewer than a sample has tokens
    "index_head_dim": 8,
    "index_n_heads": 16,  # of few heads all may be 0 for several tokens, and the choice arbitrary
}
#: Later layers use the keys and values of the last one before them of their kind.
_SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": tiny.VOCAB,
    "hidden_size_per_layer_input": 8,
}
_BOTH_ROPES: dict[str, Any] = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
#: Settings that one architecture needs besides.
_EXTRA: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 11},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cpmant": {"dim_ff": 64},
    "cohere_compass_text": {"rope_parameters": _BOTH_ROPES},
    "ctrl": {"dff": 64},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4": {"text_config": _SHARED_KEYS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "use_sliding_window": True},
    "roc_bert": {"shape_vocab_size": 9, "pronunciation_vocab_size": 9},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def all_architectures() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind)
    sizes = _sizes_of(known)
    for name, value in _EXTRA.get(kind, {}).items():
        nested = isinstance(value, dict) and name in sizes
        sizes[name] = {**sizes[name], **value} if nested else value
    return AutoConfig.for_model(kind, **sizes)


def _sizes_of(known: Any) -> dict[str, Any]:
    """Return the small sizes of a configuration and of the ones inside it."""

    def has(name: str) -> bool:
        if isinstance(getattr(type(known), name, None), property):
            return False
        return name in {**known.attribute_map, **vars(known)} or hasattr(type(known), name)

    sizes = {name: value for name, value in SIZES.items() if has(name)}
    if has("qk_rope_head_dim"):
        sizes |= {name: value for name, value in _LATENT.items() if has(name)}
    for name in known.sub_configs:
        if (part := getattr(known, name, None)) is not None:
            sizes[name] = {"model_type": part.model_type, **_sizes_of(part)}
    return sizes


def build(kind: str) -> Any:
    """Return a tiny random model in eval mode, so that no dropout differs."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in model.parameters())
    if size > 1e7:
        raise ValueError(f"{size} parameters is not tiny")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
