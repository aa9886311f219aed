"""Data sets of the user's own: what is taken, which way labels look, what is told at start."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer

from ds_kd.config.components import Component, ConfigError
from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.data.labels import describe_unsupervised
from ds_kd.data.own import DataError, OwnSamples
from ds_kd.data.packing import PackedDataset
from ds_kd.data.rows import source
from ds_kd.data.rows.detect import known_data_sets
from ds_kd.data.rows.source import hash_code, load_rows, tokenize
from ds_kd.data.text import make_text_dataset
from ds_kd.parallel.world import World
from ds_kd.recipe.data import samples_of
from tests import tiny

HF = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}  # Hugging Face's convention
OURS = {"input_ids": [5, 6, 7], "labels": [-100, 7, 8]}  # the same, shifted
ALONE = World(0, 1, torch.device("cpu"), "gloo")


def tokens(sample: dict) -> tuple[list[int], list[int]]:
    return sample["input_ids"], sample["labels"]


# ---- which way labels look


def test_shifted_labels_are_taken_as_they_are():
    assert tokens(OwnSamples([OURS], 10)[0]) == tokens(OURS)


def test_unshifted_labels_are_shifted_where_the_section_says_so():
    assert tokens(OwnSamples([HF], 10, "unshifted")[0]) == tokens(OURS)


def test_unshifted_labels_are_refused_where_it_does_not():
    with pytest.raises(DataError, match=r"equal their input_ids.*write labels: unshifted"):
        OwnSamples([HF] * 3, 10)


def test_labels_that_are_shifted_already_are_not_shifted_again():
    with pytest.raises(DataError, match="remove labels: unshifted"):
        OwnSamples([OURS] * 3, 10, "unshifted")


@pytest.mark.parametrize("labels", ["shifted", "unshifted"])
def test_where_both_readings_fit_the_sections_word_counts(labels):
    constant = {"input_ids": [4, 4, 4], "labels": [4, 4, 4]}
    nothing = {"input_ids": [4, 5], "labels": [-100, -100]}
    assert len(OwnSamples([constant, nothing], 10, labels)) == 2


def test_one_label_that_happens_to_repeat_its_token_is_no_convention():
    repeats = {"input_ids": [5, 6, 6, 7], "labels": [-100, 6, 7, 8]}
    assert tokens(OwnSamples([repeats], 10)[0]) == tokens(repeats)


def test_shifting_goes_by_segment_and_keeps_the_count_of_real_tokens():
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "segment_lengths": [3, 0, 2]}
    made = OwnSamples([packed], 10, "unshifted")[0]
    assert tokens(made) == ([1, 2, 4], [2, 3, 5])  # 3 never predicts 4
    assert made["segment_lengths"] == [2, 0, 1]
    padded = {"input_ids": [1, 2, 3, 0], "labels": [1, 2, 3, -100], "num_tokens": 3}
    made = OwnSamples([padded], 10, "unshifted")[0]
    assert (tokens(made), made["num_tokens"]) == (([1, 2, 3], [2, 3, -100]), 2)


def test_the_same_text_gives_the_same_batch_in_both_conventions():
    one, other = (
        default_collater([OwnSamples([HF], 10, "unshifted")[0]]),
        default_collater([OwnSamples([OURS], 10)[0]]),
    )
    assert one["supervised"].tolist() == other["supervised"].tolist() == [1, 2]
    assert one["supervised_labels"].tolist() == other["supervised_labels"].tolist() == [7, 8]


# ---- what is taken


def test_tensors_and_tuples_become_lists_and_a_sample_gets_its_number():
    import numpy as np

    for kind in (torch.tensor, np.array, tuple):
        given = {name: kind(value) for name, value in OURS.items()}
        assert OwnSamples([OURS, given], 10)[1] == {**OURS, "sample_id": "1"}


@pytest.mark.parametrize(
    "sample, said",
    [
        ([1, 2], "it is list, expected a mapping"),
        ({"input_ids": [1]}, "no labels; it has input_ids"),
        ({}, "no input_ids; it has nothing"),
        ({"input_ids": [1, 2], "labels": [2]}, "2 input_ids and 1 labels"),
        ({"input_ids": [10], "labels": [1]}, "input_ids holds 10.*0 to 9"),
        ({"input_ids": [1], "labels": [-1]}, "labels holds -1.*0 to 9, or -100"),
        ({"input_ids": torch.ones(1, 2).long(), "labels": [1]}, r"shape \[1, 2\]"),
        ({"input_ids": "text", "labels": [1]}, "'text', expected one list of integers"),
        ({"input_ids": [1.5], "labels": [1]}, "expected one list of integers"),
        ({"input_ids": None, "labels": [1]}, "None, expected one list"),
        ({**OURS, "attention_mask": [0, 1, 1]}, "padded on the left"),
        ({**OURS, "segment_lengths": [2]}, "add up to 2 of 3"),
    ],
)
def test_a_sample_out_of_the_contract_is_named_with_what_is_wrong(sample, said):
    with pytest.raises(DataError, match=f"sample 1: .*{said}"):
        OwnSamples([OURS, sample], 10)


def test_a_bad_sample_far_from_the_first_is_named_when_it_is_read():
    data = OwnSamples([OURS] * 40 + [{"input_ids": [1], "labels": []}], 10)
    with pytest.raises(DataError, match="sample 40: 1 input_ids and 0 labels"):
        data[40]


def test_data_without_length_or_without_numbers_are_refused():
    import datasets

    rows = datasets.Dataset.from_list([OURS])
    for given, said in (
        (rows.to_iterable_dataset(), "IterableDataset.*does not stream"),
        (iter([OURS]), "list_iterator"),
        (datasets.DatasetDict(train=rows), "splits or columns train"),
        (None, "NoneType"),
    ):
        with pytest.raises(DataError, match=said):
            OwnSamples(given, 10)
    assert tokens(OwnSamples(rows, 10)[0]) == tokens(OURS)


def test_a_sample_without_a_token_is_packed_and_padded_beside_others():
    empty = {"input_ids": [], "labels": [], "sample_id": "empty"}
    data = OwnSamples([empty, OURS, empty], 10)
    for samples in ([PackedDataset(data, 8)[0]], [data[k] for k in range(3)]):
        batch = default_collater(samples)
        assert batch["num_labels"] == 2 and batch["num_tokens"] == 3
        assert 0 not in batch.get("segment_lengths", [])
    only = default_collater([PackedDataset(OwnSamples([empty], 10), 8)[0]])
    assert only["segment_lengths"] == [1] and only["num_tokens"] == 0


# ---- what is told at start


def test_samples_without_a_supervised_token_are_counted_and_named(tmp_path):
    quiet = {"input_ids": [1], "labels": [-100]}
    few = [{**OURS, "sample_id": "a"}] * 199 + [{**quiet, "sample_id": "q"}]
    assert describe_unsupervised(few[:9]) == ""
    assert describe_unsupervised(few) == "1 of 200 samples (0.5%) have no supervised token: q"
    assert describe_unsupervised(few[100:] + few[-1:]).startswith(
        "warning: 2 of 101 samples (2.0%)"
    )
    with pytest.raises(ValueError, match=r"none of the 2 samples.*--show-samples"):
        describe_unsupervised([quiet] * 2)


def test_a_hugging_face_data_set_is_counted_like_a_list():
    import datasets

    rows = [
        {"input_ids": [0] * len(labels), "labels": labels, "sample_id": str(k)}
        for k, labels in enumerate([[], [5], [-100, -100], [-100, 3], [1, 2, 3], [-100]])
    ]
    data = datasets.concatenate_datasets([datasets.Dataset.from_list(rows)] * 2)
    assert describe_unsupervised(data) == describe_unsupervised(rows * 2)
    assert "6 of 12" in describe_unsupervised(data)
    assert "2 of 4" in describe_unsupervised(data.select([10, 5, 0, 1]))
    assert describe_unsupervised(data.select([1, 3, 4])) == ""


def test_a_bad_row_is_told_before_all_rows_are_gone_through(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3000)))
    seen = []

    def sample(row, index):
        seen.append(index)
        if row["n"] % 5 == 4:
            raise ValueError(f"row {index} is bad")
        return {"input_ids": [1], "labels": [1]}

    with pytest.raises(ValueError, match="row 4 is bad"):
        tokenize(load_rows(str(path), "train", ("n",)), sample)
    assert seen == [0, 1, 2, 3, 4]


def test_rows_are_tokenised_once_and_found_again_by_later_runs_and_other_ranks(
    tmp_path, monkeypatch
):
    """Samples of a function that `datasets` cannot hash are made, and kept, at every start."""
    tiny.tokenizer(tmp_path / "t")
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}')
    load = lambda: AutoTokenizer.from_pretrained(tmp_path / "t")  # noqa: E731
    made = [make_text_dataset(str(tmp_path / "rows.jsonl"), load()) for _ in range(2)]
    assert made[0].cache_files == made[1].cache_files != []

    # The functions of all data sets can be hashed, and have one hash each.
    monkeypatch.setattr(source, "load_rows", lambda *_: None)
    monkeypatch.setattr(source, "tokenize", lambda _, function: Hasher.hash(function))
    tokenizer = load()
    tokenizer.chat_template = "{{ messages }}"
    known = [each for each in known_data_sets() if not each.has_parts]
    hashes = [
        [each.build(tokenizer=tokenizer, **{each.source: "rows"}) for each in known]
        for _ in range(2)
    ]
    assert hashes[0] == hashes[1] and len({*hashes[0]}) == len(known)


def test_samples_that_other_code_has_made_are_made_anew(tmp_path, monkeypatch):
    """`datasets` keeps samples, and knows the functions of a module by their names alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')

    def make():
        rows = load_rows(str(path), "train", ("n",))
        return list(tokenize(rows, tiny.count_up)["input_ids"])

    assert make() == [[1], [2]]
    monkeypatch.setattr(tiny.count_up, "__code__", (lambda row, index: {"input_ids": [9]}).__code__)
    monkeypatch.setattr(source, "hash_code", lambda _: "of another version")
    assert make() == [[9], [9]]


def test_every_file_that_makes_samples_counts(tmp_path):
    code = tmp_path / "data"
    shutil.copytree(source._CODE, code)
    (code / "deeper").mkdir(exist_ok=True)
    found = [hash_code(source._CODE)]
    assert hash_code(code) == found[0]
    (code / ".#chat.py").symlink_to("nobody@nowhere.1")  # an editor's lock
    for name in ("chat.py", "rows/source.py", "deeper/new.py"):
        with (code / name).open("a") as file:
            file.write("# changed")
        hash_code.cache_clear()
        found.append(hash_code(code))
    assert len({*found}) == 4


# ---- by way of the config

MODULE = """
import torch
def unshifted(tokenizer, count: int = 4):
    ids = tokenizer("w1 w2 w3 w4")["input_ids"]
    return [{"input_ids": ids, "labels": torch.tensor(ids)}] * count
def of_another_tokenizer(tokenizer):
    return [{"input_ids": [1, 2], "labels": [2, 9000]}]
def read(row):
    return row["poem"]
def of_other_columns(tokenizer):
    return [read({"title": 1})]
def of_a_wrong_type(tokenizer):
    return len(3)
class Fails:
    def __init__(self, tokenizer, after: int):
        self.after = after
    def __len__(self):
        return 40
    def __getitem__(self, k):
        return read({}) if k >= self.after else {"input_ids": [5, 6], "labels": [6, 7]}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A config file whose data set is a function of a module of the user's."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")

    def write(function: str, **kwargs):
        section = {"_target_": f"{name}.{function}", **kwargs}
        path = tmp_path / "c.yaml"
        models = {part: {"pretrained_model_name_or_path": "of/hub"} for part in
                  ("model", "teacher_model")}  # fmt: skip
        path.write_text(json.dumps({**models, "dataset": section}))
        return path, (name,), tokenizer

    yield write
    sys.modules.pop(name, None)


def built(path, allow, tokenizer):
    return samples_of(load(path, [], allow=allow).dataset, tokenizer, ALONE)


def test_an_own_data_set_with_hugging_faces_labels_runs_once_its_section_says_so(own):
    data = built(*own("unshifted", labels="unshifted", count=2))
    assert len(data) == 2 and data[0]["input_ids"][1:] == data[0]["labels"][:-1]
    with pytest.raises(ConfigError, match=r"dataset: got .*write labels: unshifted"):
        built(*own("unshifted"))


def test_ids_of_another_tokenizer_are_told_with_the_data_set(own):
    with pytest.raises(ConfigError, match=r"dataset: got .*sample 0: labels holds 9000.*0 to 95"):
        built(*own("of_another_tokenizer"))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("of_other_columns", r"KeyError: 'poem' \(\S+.py:9 in read, called at \S+.py:11 in of_oth"),
        (
            "of_a_wrong_type",
            r"dataset: TypeError: object of type 'int' .*py:13 in of_a_wrong",
        ),
        ("Fails", r"sample 3: KeyError: 'poem' \(\S+.py:9 in read, called at \S+:20 in __getitem"),
    ],
)
def test_an_error_of_an_own_data_set_is_told_with_its_own_lines_alone(own, function, said):
    arguments = {"after": 3} if function == "Fails" else {}
    with pytest.raises(ConfigError, match=said) as caught:
        built(*own(function, **arguments))
    assert "ds_kd/" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_middle_of_training_data_is_one_sentence_too(own, workers, tmp_path):
    path, allow, tokenizer = own("Fails", after=99)
    data = built(path, allow, tokenizer)
    data.dataset.after = 30
    with pytest.raises(DataError) as caught:
        [*torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)]
    assert caught.value.text().startswith("sample 30: KeyError: 'poem' (")
    assert "\n" not in caught.value.text()


def test_the_check_knows_what_labels_may_be(own, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset.labels: got 'both', expected shifted or unshi"):
        built(*own("unshifted", labels="both"))
    path, *_ = own("unshifted")
    rows = tmp_path / "squad.jsonl"
    rows.write_text(tiny.squad_rows(2))
    squad = ["dataset._target_=ds_kd.data.squad.make_squad_dataset", f"dataset.dataset_name={rows}"]
    with pytest.raises(ConfigError, match=r"dataset.labels: .*shifts its labels itself; remove it"):
        load(path, [*squad, "dataset.labels=unshifted"])
    assert "labels" not in load(path, [*squad, "dataset.labels=shifted"]).dataset.kwargs


def test_a_data_set_of_which_nothing_is_supervised_is_refused_by_name(tmp_path):
    rows = tmp_path / "q.jsonl"
    rows.write_text(json.dumps({"context": "w1", "question": "w2", "answers": {"text": []}}))
    component = Component(
        "ds_kd.data.squad.make_squad_dataset", {"dataset_name": str(rows)}, "dataset"
    )
    with pytest.raises(
        ConfigError, match=r"dataset.dataset_name: .*q.jsonl.*none of the 1 samples"
    ):
        samples_of(component, tiny.tokenizer(tmp_path / "t"), ALONE)


def test_a_share_without_supervision_is_printed_at_start(tmp_path, capsys):
    rows = tmp_path / "q.jsonl"
    empty = json.dumps({"context": "w1", "question": "w2", "answers": {"text": []}})
    rows.write_text(f"{tiny.squad_rows(3)}\n{empty}\n")
    component = Component(
        "ds_kd.data.squad.make_squad_dataset", {"dataset_name": str(rows)}, "dataset"
    )
    samples_of(component, tiny.tokenizer(tmp_path / "t"), ALONE)
    told = "dataset: warning: 1 of 4 samples (25.0%) have no supervised token: 3"
    assert told in capsys.readouterr().out


def test_a_sample_longer_than_the_models_positions_is_warned_of(tmp_path, capsys):
    rows = tmp_path / "q.jsonl"
    rows.write_text(tiny.squad_rows(3))
    data = Component("ds_kd.data.squad.make_squad_dataset", {"dataset_name": str(rows)}, "dataset")
    tokenizer = tiny.tokenizer(tmp_path / "t")
    tokenizer.model_max_length = 9
    longest = max(len(sample["input_ids"]) for sample in samples_of(data, tokenizer, ALONE))
    told = f"dataset: warning: its longest sample has {longest} tokens, and the tokenizer's"
    assert longest > 9 and told in capsys.readouterr().out
