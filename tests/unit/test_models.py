"""Vocabularies: same maps pass whatever the heads' padding, different maps are refused by name."""

from __future__ import annotations

import pytest

from ds_kd.models import common_vocab_size
from tests import tiny


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

    from ds_kd.pretrained import load_model
    from ds_kd.schema import MODEL
    from ds_kd.targets import ConfigError, Target

    path = tiny.llama(tmp_path / "model", tie=False)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    target = Target(MODEL, {"pretrained_model_name_or_path": str(path)}, "model")
    with pytest.raises(ConfigError, match=r"lack weights.*lm_head.weight"):
        load_model(target, {"zero_optimization": {"stage": 0}}, False, ())


def test_a_damaged_file_of_weights_is_told(tmp_path):
    from ds_kd.pretrained import load_model
    from ds_kd.schema import MODEL
    from ds_kd.targets import ConfigError, Target

    path = tiny.llama(tmp_path / "model")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    target = Target(MODEL, {"pretrained_model_name_or_path": str(path)}, "model")
    with pytest.raises(ConfigError, match="a file of its weights is damaged"):
        load_model(target, {"zero_optimization": {"stage": 0}}, False, ())
