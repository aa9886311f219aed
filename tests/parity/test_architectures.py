"""Loss and gradients of every causal architecture equal plain transformers, or it is refused:
padded, packed beyond its window, and with checkpointed activations."""

from __future__ import annotations

import pytest
import torch

from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.models import causal_lm, probes
from ds_kd.models.attention import attend_by_sample
from tests import tiny

CPU = torch.device("cpu")
#: Dense and mixtures, windows in attention and in the mask, caps, scales, biases, learned and
#: rotary positions, one shared norm and parallel blocks.
CHOSEN = [
    "cohere",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "mistral",
    "mixtral",
    "opt",
    "phimoe",
    "qwen3",
]
SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
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
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # Checkpointed layers recompute in training alone, where dropout must not differ.
    **dict.fromkeys(
        ["dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "resid_pdrop"], 0.0
    ),
    **dict.fromkeys(
        [
            "embd_pdrop",
            "attn_pdrop",
            "layerdrop",
            "resid_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
        ],
        0.0,
    ),
}


def all_architectures():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind):
    """A tiny random model in eval mode, so that no dropout differs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{n: v for n, v in SIZES.items() if hasattr(known, n)})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"{size} parameters is not tiny")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Engine:
    """Of an engine what the probes use, without DeepSpeed: calls go to the module."""

    def __init__(self, module):
        self.module, self.training = module, False
        self.eval, self.train = module.eval, module.train

    def __call__(self, batch, probe):
        return self.module(batch, probe=probe)


def plain(model, rows):
    """Loss and gradients, one sample at a time, as transformers computes the logits."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(row["labels"]), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        total += loss.item()
    return total, take_gradients(model)


def take_gradients(model):
    taken = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def compare(kind, model):
    """Raise an AssertionError where a way of running a batch differs from plain transformers, a
    ValueError where the probes refuse the model before it could."""
    rows = tiny.samples(5, seed=3)
    module = causal_lm.Student(
        model, DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=5), 0.0)
    )
    module.eval()
    engine = Engine(module)
    probes.check_head(engine, CPU, kind)
    expected, gradients = plain(model, rows)

    def check(batch, way):
        loss, _ = module(batch)
        loss.backward()
        got = take_gradients(model)
        assert loss.item() == pytest.approx(expected, rel=1e-4), f"{kind}, {way}: the loss"
        scale = max(g.abs().max().item() for g in gradients.values())
        for name, gradient in gradients.items():
            error = (got[name] - gradient).abs().max().item()
            assert error <= 1e-3 * scale, f"{kind}, {way}: the gradient of {name}"

    check(default_collater(rows), "padded")
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        check(default_collater(rows), "checkpointed")
        model.gradient_checkpointing_disable()
        model.eval()
    attend_by_sample(model)
    probes.check_packing(engine, CPU, kind)
    packed = PackedDataset(rows, 64)
    check(default_collater([packed[k] for k in range(len(packed))]), "packed")


@pytest.mark.parametrize("kind", CHOSEN)
def test_losses_and_gradients_equal_plain_transformers(kind):
    compare(kind, build(kind))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", all_architectures())
def test_every_architecture_is_right_or_refused(kind):
    try:
        model = build(kind)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {error}")
    try:
        compare(kind, model)
    except ValueError as error:  # of the probes, in a sentence that names the model
        assert str(error).startswith(f"{kind}: ") or "no language-model head" in str(error)
