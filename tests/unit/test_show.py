"""Samples for eyes: `--show-samples`, and the example of the docs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.labels import shift
from ds_kd.evaluate.show import render
from tests import tiny
from tests.scripts import script
from tests.unit.test_data import swag_row, turns, write
from tests.unit.test_supervised import byte_level_bpe

kd = script("kd")
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def sample(text: str, taught: str, tokenizer) -> dict:
    """A sample whose tokens of `taught` are supervised."""
    ids = tokenizer(text)["input_ids"]
    return {**shift(ids, [tokenizer.decode([i]) in taught for i in ids]), "sample_id": "s"}


def test_supervised_tokens_stand_in_brackets_or_in_colour():
    tokenizer = byte_level_bpe()
    made = sample("it is Paris what 1969", " Paris 1969", tokenizer)
    assert render(made, tokenizer, False).splitlines()[1] == "it is[[ Paris]] what[[ 1969]]"
    assert "\033[1;32m Paris\033[0m what" in render(made, tokenizer, True)


def test_the_number_of_tokens_and_labels_is_told_and_padding_left_out():
    tokenizer = byte_level_bpe()
    made = sample("it is Paris", " Paris", tokenizer)
    padded = {
        "num_tokens": len(made["input_ids"]),
        "sample_id": "s",
        "input_ids": made["input_ids"] + [0] * 3,
        "labels": made["labels"] + [-100] * 3,
    }
    shown = render(padded, tokenizer, False)
    count = len(tokenizer("it is Paris")["input_ids"])
    assert shown == f"--- sample s: {count} tokens, 1 supervised\nit is[[ Paris]]"


def test_each_packed_sample_ends_with_what_it_predicts():
    tokenizer = byte_level_bpe()
    one = sample("it is Paris", " Paris", tokenizer)
    n = len(one["input_ids"])
    packed = {
        "sample_id": "s",
        "input_ids": one["input_ids"] * 2,
        "labels": one["labels"] * 2,
        "segment_lengths": [n, n],
    }
    assert render(packed, tokenizer, False).endswith("it is[[ Paris]]it is[[ Paris]]")


@pytest.fixture
def run(tmp_path):
    """The arguments of a run whose student is a tokenizer alone: no model could be loaded."""
    student = tmp_path / "student"
    tiny.tokenizer(student)
    tiny.weightless(student, '{"model_type": "llama"}')
    rows = tmp_path / "q.jsonl"
    rows.write_text(tiny.squad_rows(5))
    model = {"pretrained_model_name_or_path": str(student)}
    section = {"_target_": "ds_kd.data.squad.make_squad_dataset", "dataset_name": str(rows)}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"model": model, "teacher_model": model, "dataset": section}))
    return path


def test_the_command_shows_samples_and_loads_no_model(run, capsys):
    assert kd.main(["--config", str(run), "--show-samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- sample ") == 2
    assert "w0 w5 w9 <unk> w7 w8 <unk>[[ w0 w3<eos>]]" in out.replace(" <eos>", "<eos>")


def test_samples_without_supervision_can_be_looked_at(run, tmp_path, capsys):
    row = {"context": "w1", "question": "w2", "answers": {"text": []}}
    rows = write(tmp_path / "none.jsonl", [row])
    arguments = ["--config", str(run), f"dataset.dataset_name={rows}", "--show-samples", "9"]
    assert kd.main(arguments) == 0
    assert "0 supervised" in capsys.readouterr().out


def test_a_number_of_samples_below_one_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        kd.main(["--config", str(run), "--show-samples", "0"])
    assert "--show-samples: got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "target, own, row",
    [
        ("hellaswag.HellaSwag", "path_or_dataset", swag_row("0")),
        ("chat.ChatDataset", "path_or_dataset_id", {"messages": turns(("assistant", "w1"))}),
    ],
)
def test_dataset_name_names_the_rows_of_every_data_set(run, tmp_path, target, own, row):
    text = json.loads(run.read_text())
    student = Path(text["model"]["pretrained_model_name_or_path"])
    (student / "chat_template.jinja").write_text("{{ messages }}")  # conversations need one
    section = text["dataset"]
    section["_target_"] = f"ds_kd.data.{target}"
    section["dataset_name"] = path = write(tmp_path / "r.jsonl", [row])
    run.write_text(json.dumps(text))
    assert load(run, []).dataset.kwargs == {own: path}
    with pytest.raises(ConfigError, match=r"command line: dataset\.dataset_name: got 'no\.json"):
        load(run, ["dataset.dataset_name=no.jsonl"])
    with pytest.raises(ConfigError, match=f"dataset: dataset_name and {own} are both given"):
        load(run, [f"dataset.{own}=other.jsonl"])


def test_the_docs_own_data_set_runs_as_written(run, tmp_path, capsys, monkeypatch):
    part = DOCS.read_text().partition("## Your own data set")[2]
    code, section = (
        re.search(rf"```{kind}\n(.*?)```", part, re.DOTALL).group(1) for kind in ("python", "yaml")
    )
    (tmp_path / "my_data").mkdir()
    (tmp_path / "my_data" / "poems.py").write_text(code)
    write(tmp_path / "poems.jsonl", [{"title": "w1 w2", "poem": "w3 w4"}] * 2)
    text = json.loads(run.read_text())
    del text["dataset"]
    run.write_text(_yaml(text) + section)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--config", str(run), "--allow-targets", "my_data", "--show-samples", "1"]
    try:
        assert kd.main(arguments) == 0
    finally:
        for name in [name for name in sys.modules if name.startswith("my_data")]:
            del sys.modules[name]
    assert "--- sample w1 w2: 5 tokens, 3 supervised" in capsys.readouterr().out


def _yaml(sections: dict) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in sections.items())
