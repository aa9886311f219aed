"""Options and input that no user means: each command ends at once in a sentence."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from tests import tiny
from tests.scripts import script

GUIDE = str(Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tiny.llama(tmp_path_factory.mktemp("words") / "model")
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (place.parent / "rows.jsonl").write_text(tiny.squad_rows(2))
    return place


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("generate", ["--model", "MODEL", "--prompt", "w1 \udcff"], "the prompt is not UTF-8"),
        ("generate", ["--model", "x" * 5000, "--prompt", "w1"], "is no path of this machine"),
        ("export", ["a\0b", "OUT"], "embedded null"),
        ("report", ["x" * 5000, "-o", "PAGE"], "is no path of this machine"),
        ("prune", ["--teacher", "x" * 5000, "--keep-layers", "1", "--output", "OUT"], "no path of"),
        (
            "sweep",
            ["-c", GUIDE, f"kd_ratio={'0,' * 99}1", f"optimizer.lr={'1e-4,' * 99}1"],
            "make 10,000 runs, and 1,000 at most",
        ),
    ],
)
def test_words_that_no_command_can_use_are_told(command, words, told, model, tmp_path, capsys):
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "PAGE": str(tmp_path / "a.html")}
    assert script(command).main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said


@pytest.mark.parametrize("seed", ["-1", "1e3", "9" * 30, "²"])
def test_a_seed_that_torch_does_not_take_is_refused(seed, model, capsys):
    with pytest.raises(SystemExit):
        script("generate").main(["--model", str(model), "--prompt", "w1", f"--seed={seed}"])
    assert "expected a whole number from 0 to 1e18" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a directory", "no text"])
def test_questions_that_cannot_be_read_end_a_talk(kind, model, tmp_path, capsys, monkeypatch):
    class Directory(io.StringIO):
        def readline(self):
            os.read(os.open(tmp_path, os.O_RDONLY), 1)

    given = Directory() if kind == "a directory" else io.TextIOWrapper(io.BytesIO(b"\xff\n"))
    monkeypatch.setattr("sys.stdin", given)
    assert script("generate").main(["--model", str(model), "--chat"]) == 2
    assert "standard input cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("{kind: generation, prompt: '{{ lipsum() }}', reference: question}", "no column lipsum"),
        ("{kind: generation, prompt: a, reference: question, max_new_tokens: 10000000}", "1000000"),
        ("{kind: generation, prompt: '{{ \"x\" * 100000 }}', reference: question}", "* 1e+05"),
        ("{kind: generation, prompt: '{{ 9**100000 }}', reference: question}", "** 1e+05"),
        ("{kind: generation, prompt: '{{ \"x\" * 9999 * 9999 }}', reference: question}", "* 1e+08"),
    ],
)
def test_a_task_that_would_use_up_the_machine_is_refused(task, told, model, tmp_path, capsys):
    (tmp_path / "task.yaml").write_text(task)
    rows = str(model.parent / "rows.jsonl")
    words = ["--model", str(model), "--task", str(tmp_path / "task.yaml"), "--data", rows]
    assert script("evaluate").main(words) == 2
    assert told in capsys.readouterr().err


def test_names_that_are_not_utf_8_are_written_as_escapes(tmp_path):
    run = tmp_path / "a\udcff"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    assert script("report").main([str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert "a\\udcff" in (tmp_path / "page.html").read_text("utf-8")
