"""Samples longer than a model's table of positions are told at the start, and no others."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.data import Subset

from ds_kd.config.components import Component, ConfigError
from ds_kd.config.load import load
from ds_kd.config.names import MODEL
from ds_kd.data.own import OwnSamples
from ds_kd.data.packing import PackedDataset, text_lengths_of
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_loader, build_samples
from ds_kd.recipe.lengths import check_lengths, check_table, find_table
from ds_kd.recipe.models import tokenizer_of
from tests import tiny
from tests.parity import architectures

ALONE = World(0, 1, torch.device("cpu"), "gloo")
MOST = 16
#: Learned tables, with and without entries before the first position, and fixed ones.
TABLES = (
    "gpt2",
    "opt",
    "biogpt",
    "gpt_bigcode",
    "gpt_neo",
    "openai-gpt",
    "gptj",
    "codegen",
    "ctrl",
)
#: Rotary positions, ALiBi, sums of sines that grow, recurrence, and a table of an image's patches.
NONE = ("llama", "gpt_neox", "phi", "falcon", "bloom", "mpt", "xglm", "mamba", "gemma3")


@pytest.mark.parametrize("kind", [*TABLES, *NONE])
def test_a_model_has_a_table_if_it_fails_one_position_beyond_it(kind, monkeypatch):
    monkeypatch.setitem(architectures.SIZES, "max_position_embeddings", MOST)
    model = architectures.build(kind)
    found = find_table(Component(MODEL, {}, "model"), model.config)
    assert found == (MOST if kind in TABLES else None)

    def run(length):
        ids, positions = torch.full((1, length), 5), torch.arange(length)[None]
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    assert run(MOST).shape[1] == MOST
    if found is None:
        assert run(MOST + 1).shape[1] == MOST + 1
    else:
        with pytest.raises((IndexError, RuntimeError), match="index"):
            run(MOST + 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models with and without a table of 16 positions, and a module of data sets."""
    import transformers as hf

    root = tmp_path_factory.mktemp("lengths")
    tiny.llama(root / "rotary")
    sizes = {"vocab_size": tiny.VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": MOST}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(root / "table")
    tiny.tokenizer(root / "table")
    (root / "own_lengths.py").write_text(
        "def rows(tokenizer, segments):\n"
        "    ids = [5] * sum(segments)\n"
        "    return [{'input_ids': ids, 'labels': ids, 'segment_lengths': segments}]\n"
        "def collate(samples):\n"
        "    return {}\n"
    )
    for name, count in (("short", 10), ("long", 11)):  # and six tokens beside these
        row = {"context": "w1 " * count, "question": "w2", "answers": {"text": ["w3 w4"]}}
        (root / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    return root


@pytest.fixture
def check(place, monkeypatch):
    """Check the samples of a config's data sets as a run does."""
    monkeypatch.syspath_prepend(str(place))

    def run(student, teacher, data, *overrides, **sections):
        squad = {"_target_": "ds_kd.data.squad.make_squad_dataset"}
        dataset = {**squad, "dataset_name": str(place / f"{data}.jsonl")}
        content = {
            "model": {"pretrained_model_name_or_path": str(place / student)},
            "teacher_model": {"pretrained_model_name_or_path": str(place / teacher)},
            "dataset": dataset,
            "checkpoint": {"checkpoint_dir": str(place / "checkpoints")},
            "step_scheduler": {"global_batch_size": 1, "local_batch_size": 1},
            **sections,
        }
        cfg = load(content, list(overrides), allow=("own_lengths",))
        samples, held_out = build_samples(cfg, tokenizer_of(cfg.model, ALONE), ALONE)
        training = build_loader(cfg, samples, cfg.dataloader, ALONE, True)[0]
        validation = [
            build_loader(cfg, part, cfg.validation_dataloader, ALONE, False)[0]
            for part in held_out.values()
        ]
        check_lengths(cfg, [training, *validation], training)

    yield run
    sys.modules.pop("own_lengths", None)


TOLD = r"table of 16 positions, and sample 0 has 17 tokens: set seq_length: 16 and truncation: true"


def test_a_sample_longer_than_either_models_table_is_refused_before_the_models_load(check):
    check("rotary", "rotary", "long")
    check("table", "table", "short")
    with pytest.raises(ConfigError, match=rf"\bmodel: got .*{TOLD}"):
        check("table", "rotary", "long")
    with pytest.raises(ConfigError, match=rf"teacher_model: got .*{TOLD}"):
        check("rotary", "table", "long")
    check("table", "table", "long", "dataset.seq_length=16", "dataset.truncation=true")


def test_padding_takes_positions_too_where_nothing_is_packed(check):
    padded = ("dataset.seq_length=17", "dataset.padding=max_length")
    with pytest.raises(ConfigError, match=TOLD):
        check("table", "rotary", "short", *padded)
    check("table", "rotary", "short", *padded, "packed_sequence.packed_sequence_size=32")


def test_positions_restart_in_packs_and_in_a_users_own(check, place):
    check("table", "rotary", "short", "packed_sequence.packed_sequence_size=64")
    with pytest.raises(ConfigError, match=TOLD):
        check("table", "rotary", "long", "packed_sequence.packed_sequence_size=64")
    own = {"_target_": "own_lengths.rows", "segments": [16, 16]}
    check("table", "rotary", "short", dataset=own)
    for more in ([], ["packed_sequence.packed_sequence_size=64"]):
        with pytest.raises(ConfigError, match=TOLD):
            check("table", "rotary", "short", *more, dataset={**own, "segments": [16, 17]})


def test_an_own_collater_may_cut_samples_and_is_left_to_do_so(check):
    check("table", "rotary", "long", dataloader={"collate_fn": "own_lengths.collate"})


def test_prompts_alone_count_where_the_student_writes_all_answers(check, place):
    """A prompt that leaves no room gets an empty text."""
    check("table", "rotary", "long", rollouts={"max_new_tokens": 4})
    with pytest.raises(ConfigError, match=TOLD):
        check("table", "rotary", "long", rollouts={"max_new_tokens": 4, "ratio": 0.5})
    held_out = {
        "_target_": "ds_kd.data.squad.make_squad_dataset",
        "dataset_name": str(place / "long.jsonl"),
    }
    with pytest.raises(ConfigError, match=TOLD):
        check(
            "table", "rotary", "long", rollouts={"max_new_tokens": 4}, validation_dataset=held_out
        )


def test_positions_are_counted_alike_whatever_holds_the_samples():
    import datasets

    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 9, 6)]
    assert text_lengths_of(rows) == text_lengths_of(datasets.Dataset.from_list(rows)) == [3, 9, 6]
    padded = datasets.Dataset.from_list([{**row, "num_tokens": 2} for row in rows])
    assert text_lengths_of(padded) == [3, 9, 6]
    assert text_lengths_of(PackedDataset(padded, 9)) == [2, 2, 2]
    packs = [{**row, "segment_lengths": [1, len(row["input_ids"]) - 1]} for row in rows]
    own = OwnSamples([*packs, {"input_ids": [], "labels": []}], tiny.VOCAB)
    assert text_lengths_of(own) == [2, 8, 5, 0]
    assert text_lengths_of(Subset(own, [1, 0])) == [8, 2]
    assert text_lengths_of(PackedDataset(Subset(own, [1, 0]), 9)) == [8, 2]
    check_table(1, [])
