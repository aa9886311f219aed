"""The declaration of a data set, and the code that asks it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from ds_kd.config.checks.data import find_declaration
from ds_kd.config.signatures import signature_of
from ds_kd.data.rows.declaration import declaration_of
from ds_kd.data.rows.detect import known_data_sets, recognise
from tests import tiny
from tests.scripts import script

POEMS = """
from ds_kd.data.labels import shift
from ds_kd.data.rows.declaration import data_set
from ds_kd.data.rows.source import make_samples, text_of

def _texts(row, arguments):
    if not row["poem"]:
        raise ValueError("the poem is empty")
    return text_of(row, "title"), text_of(row, "poem")

@data_set("poems", ("title", "poem"), _texts, limit="most")
def read_poems(tokenizer, poems, split="train", most=None):
    def sample(row):
        title, poem = (tokenizer(text)["input_ids"] for text in _texts(row, {}))
        return shift(title + poem, [False] * len(title) + [True] * len(poem))
    return make_samples(poems, split, ("title", "poem"), most, sample)
"""


#: The example of docs/data.md: a declaration, no argument that limits the rows, unshifted labels.
WITHOUT_LIMIT = """
import json

from ds_kd.data.rows.declaration import data_set

@data_set("path", ("title", "poem"))
def poems(tokenizer, path, seq_length=512):
    samples = []
    for line in open(path, encoding="utf-8"):
        title, poem = (tokenizer(text)["input_ids"] for text in json.loads(line).values())
        samples.append({"input_ids": title + poem, "labels": [-100] * len(title) + poem})
    return samples
"""


def test_each_data_set_is_found_and_reads_rows_with_its_columns():
    names = {each.name.rpartition(".")[2] for each in known_data_sets()}
    assert names >= {"make_squad_dataset", "HellaSwag", "ChatDataset", "make_sharegpt_dataset",
                     "make_instruction_dataset", "make_text_dataset"}  # fmt: skip
    for each in known_data_sets():
        assert declaration_of(each.build) is each
        assert not each.columns or recognise([*each.columns, "more"]) is each
    assert recognise(["body"]) is None


@pytest.fixture
def poems(tmp_path, monkeypatch, capsys):
    """A data set in one file outside the package, and what runs the command on it."""
    for name, text in (
        ("my_poems", POEMS),
        ("my_plain", WITHOUT_LIMIT),
        ("my_broken", "import not_there\n" + POEMS),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    find_declaration.cache_clear()
    signature_of.cache_clear()
    part = {"pretrained_model_name_or_path": str(tiny.llama(tmp_path / "model"))}
    section = {"_target_": "my_poems.read_poems", "poems": str(tmp_path / "rows.jsonl")}
    config = {"model": part, "teacher_model": part, "dataset": section,
              "checkpoint": {"checkpoint_dir": str(tmp_path / "run")}}  # fmt: skip
    (tmp_path / "cfg.yaml").write_text(json.dumps(config))

    def run(rows, *words):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = script("kd").main(["--config", str(tmp_path / "cfg.yaml"), *words])
        return SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    return run


ALLOW = ("--allow-targets", "my_poems")
GOOD = [{"title": f"w{k}", "poem": "w5 w6"} for k in range(3)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*GOOD, {"title": "w1", "poem": ""}], "line 4: the poem is empty"),
        ([{"name": "w1"}], "expected rows with title, poem; its first row has name"),
    ],
)
def test_rows_of_a_data_set_from_outside_are_checked_by_its_declaration(poems, rows, said):
    bad = poems(rows, *ALLOW, "--check")
    assert bad.returncode == 2 and said in bad.err
    assert "dataset.poems: got" in bad.err


def test_a_data_set_from_outside_is_shown_and_needs_to_be_allowed(poems):
    assert "nothing wrong" in poems(GOOD, *ALLOW, "--check").out
    shown = poems(GOOD, *ALLOW, "--show-samples", "1", "dataset.most=2")
    assert shown.out == "--- sample 0: 3 tokens, 2 supervised\nw0[[ w5 w6]]\n", shown.err
    refused = poems(GOOD, "--check")
    assert refused.returncode == 2 and "add --allow-targets my_poems" in refused.err
    wrong = poems(GOOD, *ALLOW, "--check", "dataset.most=0")
    assert "dataset.most: got 0, expected an integer ≥ 1" in wrong.err


def test_a_data_set_from_outside_that_takes_no_limit_is_planned(poems, tmp_path):
    rows = [*GOOD, *({"title": "w1", "poem": "w5 w6 w7"} for _ in range(97))]
    plain = ("--allow-targets", "my_plain", "--dry-run", "step_scheduler.local_batch_size=2")
    section = f"_target_: my_plain.poems, path: {tmp_path / 'rows.jsonl'}"
    told = poems(rows, *plain, f"dataset={{{section}, labels: unshifted}}")
    # Four tokens in 97 of the samples, one less where unshifted labels lose the last position.
    assert "nine tenths of its first 64 samples have at most 3" in told.out, told.err
    assert "from 100 samples" in told.out and "about 6 tokens each" in told.out
    # A sample that breaks the contract ends in its number.
    wrong = poems(rows, *plain, f"dataset={{{section}, labels: shifted}}")
    assert wrong.returncode == 2 and "dataset.path: " in wrong.err and "labels" in wrong.err
    short = poems(rows, *plain, f"dataset={{{section}, labels: unshifted}}",
                  "packed_sequence.packed_sequence_size=2")  # fmt: skip
    assert "packed_sequence_size: got 2" in short.err and "size: 3 or more" in short.err
    bare = poems([{"title": "", "poem": "w5"}], *plain, f"dataset={{{section}, labels: unshifted}}")
    assert bare.returncode == 2 and "there is no token in its first samples" in bare.err


def test_a_declaration_that_cannot_be_imported_is_told_with_its_error(poems):
    refused = poems(
        GOOD, "--allow-targets", "my_broken", "--check", "dataset._target_=my_broken.read_poems"
    )
    assert refused.returncode == 2
    assert "dataset._target_: my_broken.read_poems cannot be imported" in refused.err
