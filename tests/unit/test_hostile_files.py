"""Files that are damaged, endless or no files at all: each command ends at once in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ds_kd.checkpoint.manifest import CheckpointError, follow, read_files_of
from ds_kd.checkpoint.restore import find
from ds_kd.checkpoint.retention import Retention, best_in, find_superfluous
from ds_kd.checkpoint.run_lock import DirectoryInUse, RunLock
from ds_kd.data.rows.source import load_rows
from ds_kd.evaluate.comparison import read_lines
from ds_kd.evaluate.report.runs import read_evaluation, read_run
from ds_kd.files import check_replaceable
from tests import tiny
from tests.scripts import script

DEEP = "[" * 100_000
TREE = '{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}, "added_tokens": []}'
#: A file of a model, the content that it has instead of its own, and a part of the message.
DAMAGES = {
    "a list for a config": ("config.json", "[1]", ""),
    "a config without bottom": ("config.json", DEEP, ""),
    "layers without end": (
        "config.json",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers 1000000000",
    ),
    "layers beyond floats": (
        "config.json",
        {"num_hidden_layers": 10**400},
        "num_hidden_layers 1000",
    ),
    "no heads": ("config.json", {"num_attention_heads": 0}, "num_attention_heads 0, expected"),
    "a text for a size": ("config.json", {"vocab_size": "x"}, ""),
    "a tokenizer that is a list": ("tokenizer.json", "[1]", ""),
    "a tokenizer without bottom": ("tokenizer.json", DEEP, ""),
    "a vocabulary of negative ids": ("tokenizer.json", TREE, ""),
    "null for a tokenizer's settings": ("tokenizer_config.json", "null", ""),
    "null for settings of generation": ("generation_config.json", "null", ""),
    "an index that is a list": ("model.safetensors.index.json", "[]", ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def rows(model):
    path = model.parent / "rows.jsonl"
    path.write_text(tiny.squad_rows(2))
    return str(path)


def damage(model, place, file, content):
    shutil.copytree(model, place)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((place / file).read_text()), **content})
    if "index" in file:
        (place / "model.safetensors").unlink()
    (place / file).write_text(content)
    return str(place)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_model_whose_files_are_damaged_is_told_by_every_command_without_a_traceback(
    kind, model, rows, tmp_path, capsys
):
    file, content, told = DAMAGES[kind]
    place = damage(model, tmp_path / "model", file, content)
    calls = {
        "generate": ["--model", place, "--prompt", "w1"],
        "prune": ["--teacher", place, "--keep-layers", "1", "--output", str(tmp_path / "out")],
        "compare": ["--teacher", place, "--student", place, "--data", rows],
        "evaluate": ["--model", place, "--task", "perplexity", "--data", rows],
    }
    for name, words in calls.items():
        assert script(name).main(words) == 2, name
        said = capsys.readouterr().err
        assert "Traceback" not in said and str(place) in said and told in said, said
        assert len(said) < 800 and len(said.splitlines()) < 5, said


def test_a_chat_template_that_would_never_end_is_told(model, tmp_path, capsys):
    place = damage(
        model, tmp_path / "model", "chat_template.jinja",
        "{% for i in range(10**9) %}x{% endfor %}",
    )  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
    words = ["--teacher", place, "--data", str(rows), "--output", str(tmp_path / "out.jsonl")]
    assert script("generate_data").main(words) == 2
    assert "template refuses the conversation: Range too big" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"), [("null", "is null"), ('{"a":' * 50_000, "nested too deeply")]
)
def test_a_first_row_at_which_the_reader_of_rows_would_crash_is_refused(content, told, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        load_rows(str(tmp_path / "a.jsonl"), "train", ())


def endless(path: Path, kind: str) -> Path:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a circle of links":
        path.symlink_to(path)
    else:
        path.write_text(kind)
    return path


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a circle of links", DEEP, "1" * 5000])
def test_a_log_and_results_that_are_none_are_not_waited_for(kind, tmp_path):
    path = endless(tmp_path / "file", kind)
    for read in (read_lines, read_evaluation):
        with pytest.raises(Exception, match="file") as caught:
            read(path)
        assert caught.value.exit_code == 2 and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a circle of links"])
def test_no_result_is_put_in_the_place_of_anything_but_a_file(kind, tmp_path, model, rows, capsys):
    path = endless(tmp_path / "file.jsonl", kind)
    with pytest.raises(FileExistsError, match="no regular file"):
        check_replaceable(path)
    words = ["--model", str(model), "--task", "squad", "--data", rows, "--output", str(path)]
    assert script("evaluate").main(words) == 2
    assert "no regular file" in capsys.readouterr().err and not path.is_file()


def test_links_in_a_circle_are_told(tmp_path, capsys):
    path = endless(tmp_path / "a.yaml", "a circle of links")
    assert script("submit").main(["--config", str(path)]) == 2
    assert script("export").main([str(path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "Too many levels" in said and "no manifest.json" in said


@pytest.mark.parametrize(
    "record",
    [
        {"step": "x"}, {"step": 1e308}, {"step": None}, {"step": 1, "val_loss": "x"},
        {"step": 1, "time/step": [1]}, {"step": 1, "val_samples": "x"},
        {"step": 1, "val_samples": [1]}, {"step": 1, "kd_loss": True},
    ],
)  # fmt: skip
def test_a_log_whose_values_no_run_writes_is_told_with_its_line(record, tmp_path, capsys):
    good = {"step": 0, "val_loss": 1.0, "val_ce_loss": float("nan"), "time/step": 0.0}
    lines = [json.dumps(each) for each in (good, record)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert script("report").main([str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "metrics.jsonl, line 2: " in capsys.readouterr().err


def test_the_yaml_beside_a_checkpoint_may_hold_anything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    (tmp_path / "LATEST").mkdir()
    tens = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]\n" for i in range(1, 12))
    for text in (f"k0: &k0 1\n{tens}", DEEP, "[1]", "1: {2: 3}", "tensorboard: {log_dir: /dev}"):
        (tmp_path / "LATEST" / "config.yaml").write_text(text)
        assert read_run(tmp_path).records


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a circle of links", DEEP, "[1]"])
def test_files_of_a_run_that_are_none_are_not_waited_for(kind, tmp_path):
    endless(tmp_path / "manifest.json", kind)
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or unreadable"):
        read_files_of(tmp_path)
    (tmp_path / "step_0000001").mkdir()
    endless(tmp_path / "step_0000001" / "validation.json", kind)
    assert best_in(tmp_path) == []


def test_a_latest_that_leads_in_a_circle_is_none(tmp_path):
    endless(tmp_path / "LATEST", "a circle of links")
    (tmp_path / "step_0000001").mkdir()
    assert follow(tmp_path / "LATEST") == tmp_path / "LATEST"
    assert find_superfluous(tmp_path, Retention(last=1, best=0)) == []
    assert find(tmp_path / "nothing", print) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_manifest_names_files_of_its_checkpoint_alone(name, tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}})
    )
    with pytest.raises(CheckpointError, match="unreadable"):
        read_files_of(tmp_path)


@pytest.mark.parametrize("kind", ["a pipe", "a device", DEEP, '{"pid": "x"}'])
def test_a_lock_that_no_run_wrote_is_the_lock_of_an_unknown_run(kind, tmp_path):
    endless(tmp_path / "RUNNING", kind)
    with pytest.raises(DirectoryInUse, match="unknown"):
        RunLock(tmp_path, stale=60, heartbeat=0.1).check()
