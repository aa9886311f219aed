"""Vocabularies: same maps pass whatever the heads' padding, different maps are refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from ds_kd.models.causal_lm import common_vocab_size
from tests import tiny
from tests.parity.architectures import all_architectures, config_of
from tests.ranks import run_ranks


@pytest.fixture
def make(tmp_path):
    def build(name, words=None, added=()):
        made = tiny.tokenizer(tmp_path / name, words=words)
        made.add_tokens(list(added))
        made.name_or_path = name
        return made

    return build


def test_equal_heads_need_nothing_left_out(make):
    assert common_vocab_size(make("a"), make("b"), 96, 96) is None


def test_heads_padded_differently_share_the_tokenizers_ids(make):
    assert common_vocab_size(make("a"), make("b"), 128, 160) == tiny.VOCAB


def test_permuted_maps_of_equal_size_are_refused_naming_the_first_difference(make):
    words = ["<unk>", "<eos>", "<pad>", "x", "y"]
    with pytest.raises(
        ValueError, match=r"(?s)student.*\(a, 5.*teacher.*\(b, 5.*'[xy]' is [34].*[34]"
    ):
        common_vocab_size(make("a", words), make("b", [*words[:3], "y", "x"]), 5, 5)


def test_a_token_added_to_one_side_is_refused(make):
    with pytest.raises(
        ValueError, match="'<extra>' is 96 for the student and absent for the teacher"
    ):
        common_vocab_size(make("a", added=["<extra>"]), make("b"), 97, 97)


def test_a_head_smaller_than_the_tokenizer_is_refused(make):
    with pytest.raises(ValueError, match="resize the smaller model's embeddings"):
        common_vocab_size(make("a"), make("b"), 90, 128)


def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    from ds_kd.config.components import Component, ConfigError
    from ds_kd.config.names import MODEL
    from ds_kd.recipe.models import load_model

    path = tiny.llama(tmp_path / "model", tie=False)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    target = Component(MODEL, {"pretrained_model_name_or_path": str(path)}, "model")
    with pytest.raises(ConfigError, match=r"lack weights.*lm_head.weight"):
        load_model(target, {"zero_optimization": {"stage": 0}}, False)


def test_a_damaged_file_of_weights_is_told(tmp_path):
    from ds_kd.config.components import Component, ConfigError
    from ds_kd.config.names import MODEL
    from ds_kd.recipe.models import load_model

    path = tiny.llama(tmp_path / "model")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    target = Component(MODEL, {"pretrained_model_name_or_path": str(path)}, "model")
    with pytest.raises(ConfigError, match="a file of its weights is damaged"):
        load_model(target, {"zero_optimization": {"stage": 0}}, False)


# ---- files against config.json -------------------------------------------------------------------


def target_of(path, **kwargs):
    from ds_kd.config.components import Component
    from ds_kd.config.names import MODEL

    return Component(MODEL, {"pretrained_model_name_or_path": str(path), **kwargs}, "model")


def edit_config(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def load_under_both_stages(world, directory, untied, misshapen):
    """[(sum of the head, what the config says), of ZeRO-0 and ZeRO-3], [messages of both]."""
    from ds_kd.config.components import ConfigError
    from ds_kd.parallel import engines
    from ds_kd.recipe.models import load_model

    heads, messages = [], []
    for stage in (0, 3):
        zero = engines.engine_config({"zero_optimization": {"stage": stage}}, torch.float32, 1)
        model = load_model(target_of(untied), zero, False)
        with engines.gather([model.lm_head.weight]):
            heads.append([model.lm_head.weight.sum().item(), model.config.tie_word_embeddings])
        try:
            load_model(target_of(misshapen), zero, False)
        except ConfigError as error:
            messages.append(str(error))
    return [heads, messages]


def test_sharded_loading_keeps_a_head_of_its_own_and_no_rank_hangs_on_a_misshapen_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    untied, misshapen = tiny.llama(tmp_path / "untied", tie=False), tiny.llama(tmp_path / "bad")
    edit_config(untied, tie_word_embeddings=True)
    head = load_file(untied / "model.safetensors")["lm_head.weight"].sum().item()
    weights = load_file(misshapen / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:5]}, misshapen / "model.safetensors")
    (tmp_path / "ranks").mkdir()
    results = run_ranks(load_under_both_stages, 2, tmp_path / "ranks", untied, misshapen)
    for heads, messages in results:
        assert heads == [[pytest.approx(head), False]] * 2
        assert len(messages) == 2
        assert all(f"{name} in the shape [5, 32]" in m and "[64, 32]" in m for m in messages)


def test_a_tied_head_that_is_in_the_file_too_stays_tied(tmp_path):
    from safetensors.torch import load_file, save_file

    from ds_kd.recipe.models import load_model

    path = tiny.llama(tmp_path / "model", tie=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model = load_model(target_of(path), {"zero_optimization": {"stage": 0}}, False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_kept_in_float16_is_loaded_and_saved_in_float32(tmp_path):
    from ds_kd.recipe.models import load_model, training_dtype

    path = tiny.llama(tmp_path / "model")
    edit_config(path, dtype="float16")
    model = load_model(target_of(path), {"zero_optimization": {"stage": 0}}, False)
    assert training_dtype(target_of(path)) == model.dtype == model.config.dtype == torch.float32
    edit_config(path, dtype="bfloat16")
    assert training_dtype(target_of(path)) == torch.bfloat16


# ---- rotary positions and names of files ---------------------------------------------------------


def test_rotary_positions_that_follow_the_batch_are_refused(tmp_path):
    from ds_kd.config.components import ConfigError
    from ds_kd.recipe.models import load_model

    path = tiny.llama(tmp_path / "model")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    edit_config(path, rope_parameters=rope)
    with pytest.raises(ConfigError, match=r"^(?s:.*)model.pretrained.*type dynamic.*rope_type"):
        load_model(target_of(path), {"zero_optimization": {"stage": 0}}, False)


def test_longrope_uses_one_table_whatever_else_is_in_the_batch(tmp_path):
    from ds_kd.recipe.lengths import check_longrope
    from ds_kd.recipe.models import fix_rope, load_model

    path = tiny.llama(tmp_path / "model")
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, **factors}
    edit_config(path, rope_parameters={**rope, "original_max_position_embeddings": 16})
    model = load_model(target_of(path), {"zero_optimization": {"stage": 0}}, False)
    assert "longrope keeps its table for up to 16 tokens" in fix_rope(model)
    check_longrope(model.config, [{"input_ids": [3] * 16}])
    with pytest.raises(ValueError, match=r"up to 16 tokens.*a sample has 17.*seq_length: 16"):
        check_longrope(model.config, [{"input_ids": [3] * 17}])
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        long, short = model(ids).logits[:, :10], model(ids[:, :10]).logits
    assert torch.allclose(long, short, atol=1e-5)


#: A weight's name in files that transformers 4 writes and vLLM reads.
NAMED_IN_FILES = {
    "Mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "Qwen2Moe": "model.layers.1.mlp.experts.3.down_proj.weight",
    "Olmoe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "GPTNeoX": "gpt_neox.layers.1.attention.dense.weight",
    "Llama": "model.layers.1.mlp.down_proj.weight",
}


@pytest.mark.parametrize("kind", NAMED_IN_FILES)
def test_weights_are_exported_under_the_names_and_values_of_the_files_they_came_from(
    kind, tmp_path
):
    import transformers as hf
    from safetensors.torch import load_file

    from ds_kd.models.files.file_names import FileNames

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    experts = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4}
    experts = experts if kind in ("Mixtral", "Qwen2Moe", "Olmoe") else {}
    config = getattr(hf, f"{kind}Config")(vocab_size=96, **sizes, **experts)
    made = hf.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    assert NAMED_IN_FILES[kind] in original
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (loaded, made):
        written = {}
        names = FileNames(model, lambda name, tensor, to=written: to.update({name: tensor}))
        for name, parameter in loaded.named_parameters():
            names.add(name, parameter.detach())
        names.flush()
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 64}
#: rope_parameters of transformers 5 → keys that transformers 4 reads.
ROPE_KEYS = [
    ("llama", {"rope_type": "default", "rope_theta": 100.0}, {"rope_theta": 100.0}),
    ("llama", {**_LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 100.0, "rotary_pct": 0.5},
    ),
    (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
        },
        {
            "rope_theta": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 200.0,
        },
    ),
]


@pytest.mark.parametrize(("kind", "parameters", "earlier"), ROPE_KEYS)
def test_rotary_settings_are_written_for_both_transformers_4_and_5(
    kind, parameters, earlier, tmp_path
):
    from transformers import AutoConfig

    from ds_kd.models.files.file_names import write_config

    config = AutoConfig.for_model(kind, rope_parameters=parameters)
    write_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key) for key in earlier} == earlier
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_every_written_config_reads_back_with_the_same_rotary_settings(tmp_path):
    from transformers import AutoConfig

    from ds_kd.models.files.file_names import write_config

    compared, differ = 0, []
    for kind in all_architectures():
        try:
            config = config_of(kind)
        except Exception:  # of a configuration that cannot be this small
            continue
        if getattr(config.get_text_config(decoder=True), "rope_parameters", None):
            write_config(config, tmp_path / kind)
            back = AutoConfig.from_pretrained(tmp_path / kind).get_text_config(decoder=True)
            same = back.rope_parameters == config.get_text_config(decoder=True).rope_parameters
            differ += [] if same else [kind]
            compared += 1
    assert compared > 100
    assert not differ


def test_a_tokenizer_is_written_under_a_class_that_transformers_4_knows(tmp_path):
    from transformers import AutoTokenizer

    from ds_kd.models.files.file_names import write_tokenizer

    tiny.llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    write_tokenizer(tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<tool>"]
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.all_special_tokens == tokenizer.all_special_tokens
