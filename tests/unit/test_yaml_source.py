"""Whatever bytes a YAML holds: the right values, or one clear error with its place, at once."""

from __future__ import annotations

import os
import time

import pytest

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import load
from tests.scripts import script

GOOD = """model: {pretrained_model_name_or_path: a/b}
kd_ratio: 0
dataset: {_target_: ds_kd.data.squad.make_squad_dataset}
"""
_TENS = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]\n" for i in range(1, 12))
_DOUBLES = "".join(f"d{i}: ${{d{i - 1}}}${{d{i - 1}}}\n" for i in range(1, 40))

_LISTED = "".join(f'- "{f"${{recipe.{k}}}" * 10}"\n' for k in range(9))

BAD = {
    "list items that multiply": ("recipe:\n- x\n" + _LISTED, "grow beyond all bounds"),
    "anchors that multiply": ("k0: &k0 [1, 1]\n" + _TENS, "more than 20000 values"),
    "references that multiply": ("d0: x\n" + _DOUBLES, "grow beyond all bounds"),
    "an anchor inside itself": ("a: &x\n  b: *x\n", "values"),
    "a reference to itself": ("a: ${b}\nb: ${a}\n", "refer to itself"),
    "ten megabytes": ("a: " + "x" * 10_000_000, "larger than 64 KiB"),
    "deep lists": ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "deep mappings": ("\n".join(" " * i + f"a{i}:" for i in range(200)), "nested too deeply"),
    "a key twice": (
        "seed: 1\nkd_ratio: 1\nseed: 2\n",
        "c.yaml:3:1: seed: given twice, first in line 1",
    ),
    "a nested key twice": ("rng: {seed: 1, seed: 2}\n", "c.yaml:1:16: rng.seed: given twice"),
    "tabs": ("model:\n\ta: 1\n", "c.yaml:2:1: not valid YAML: .*indent with spaces"),
    "a key that is no word": ("on: 1\n", "c.yaml:1:1: the key on .*put it in quotes"),
    "a reference in a list": ("a: [${seed}]\n", "put .*in quotes"),
    "a list as a key": ("? [a, b]\n: 1\n", "a key must be a word"),
    "two documents": ("a: 1\n---\nb: 2\n", "c.yaml:2:1: not valid YAML"),
    "a Python object": (
        "a: !!python/object/apply:os.system [id]\n",
        "could not determine a constr",
    ),
    "nothing": ("", "got an empty file"),
    "a list": ("- 1\n", "got a sequence"),
    "a NUL": ("a: \x00\n", "not valid YAML"),
    "a date": ("seed: 2026-01-01\n", "c.yaml:1:1: seed: got '2026-01-01'"),
    "a variable that is not set": ("seed: ${oc.env:NO_SUCH}\n", "NO_SUCH is not set; set it, or"),
    "a key that is not there": ("seed: ${no.such}\n", "c.yaml:1:1: seed: .*no.such"),
    "a resolver": ("a: ${oc.create:'b'}\n", "a: .*oc.create.* is not known here"),
    "a computed reference": ("seed: ${a.${b}}\n", "the whole key written out"),
    "an open reference": ("seed: ${\n", "seed"),
    "a resolver with braces inside": ("seed: '${oc.create:{a: 1}}'\n", "braces inside"),
    "a selection with braces inside": ("seed: '${oc.select:optimizer.lr,{}}'\n", "braces inside"),
    "a default with braces inside": ("seed: '${oc.env:HOME,{}}'\n", "braces inside"),
    "a selection": ("seed: ${oc.select:optimizer.lr}\n", "oc.select.* is not known here"),
    "a decoder": ("seed: ${oc.decode:1}\n", "oc.decode.* is not known here"),
    "a computed variable": ("a: B\nseed: ${oc.env:${a}}\n", "the whole key written out"),
    "empty references that multiply": (
        "d0: ''\n" + "".join(f"d{i}: ${{d{i - 1}}}${{d{i - 1}}}\n" for i in range(1, 17)),
        "grow beyond all bounds|more than 1000",
    ),
    "selections that multiply": (
        "".join(f"d{i}: ${{oc.select:d{i - 1}}}${{oc.select:d{i - 1}}}\n" for i in range(1, 40)),
        "oc.select.* is not known here",
    ),
    "many references": ("recipe:\n" + "- ${kd_ratio}\n" * 4000, "more than 1000"),
    "many of one text": ("recipe: '" + "${seed}" * 9000 + "'\n", "more than 1000"),
    "many references to a large section": (
        "recipe:\n" + "- ${d}\n" * 100 + "d:\n" + "- aaaaaaaa\n" * 1500,
        "beyond all bounds",
    ),
    "braces without end": ("recipe: '" + "${" * 900 + "'\n", "left open"),
    "a long split": (
        "dataset: {_target_: ds_kd.data.squad.make_squad_dataset, split: 'a"
        + " " * 60_000
        + "b'}\n",
        "dataset.split: got",
    ),
    "a long split of words": (
        "dataset: {_target_: ds_kd.data.squad.make_squad_dataset, split: '"
        + "a." * 30_000
        + "'}\n",
        "dataset.split: got",
    ),
    "a long line before a wrong key": (
        "rng: {ranked: '" + "key " * 15_000 + "', sede: 1}\n",
        "sede",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_one_clear_error_within_two_seconds(name, tmp_path):
    content, expected = BAD[name]
    path = tmp_path / "c.yaml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(ConfigError, match=expected):
        load(path)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("kind", ["fifo", "device", "unreadable file", "directory"])
def test_only_regular_files_are_read(kind, tmp_path):
    path = tmp_path / "c.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "unreadable file":  # a regular file by its mode, yet every read of it fails
        path.symlink_to("/proc/self/mem")
    else:
        path.mkdir()
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"c\.yaml: .*(not a regular|cannot be read)"):
        load(path)
    good = tmp_path / "good.yaml"
    good.write_text(f"{GOOD}deepspeed: {{student: {path}}}\n")
    with pytest.raises(ConfigError, match=r"deepspeed.student: .*(not a regular|cannot be read)"):
        load(good)
    assert time.process_time() - started < 2


def test_a_zero_file_of_more_than_ten_megabytes_is_refused(tmp_path):
    (tmp_path / "z.json").write_text(" " * 10_000_001)
    path = tmp_path / "c.yaml"
    path.write_text(f"{GOOD}deepspeed: {{student: {tmp_path / 'z.json'}}}\n")
    with pytest.raises(ConfigError, match=r"deepspeed\.student: .*larger than 10 MB"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode("utf-8-sig"),
        GOOD.replace("\n", "\r\n").encode(),
        ("x-y: ignored\n" + GOOD).replace("x-y: ignored\n", "# αβγ\n").encode(),
        GOOD.replace("kd_ratio: 0", "kd_ratio: ${oc.env:NO_SUCH,0}").encode(),
        ("rng: &r {seed: 7}\n" + GOOD + "step_scheduler:\n  num_epochs: ${rng.seed}\n").encode(),
    ],
    ids=["BOM", "CRLF", "other letters", "a default of a variable", "anchor and reference"],
)
def test_unusual_but_right_yaml_loads(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:  # the data set alone is wrong
        load(path, ["dataset._target_=nowhere.x"])
    assert len(caught.value.problems) == 1 and "nowhere.x" in str(caught.value)


def test_merge_keys_are_merged(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "dataloader: &d {shuffle: true}\nvalidation_dataloader: {<<: *d, drop_last: 5}\n" + GOOD
    )
    with pytest.raises(ConfigError, match=r"c\.yaml:.*validation_dataloader.drop_last: got 5"):
        load(path)


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"seed: 1\nrecipe: \xe9\n")
    with pytest.raises(ConfigError, match=r"c.yaml:2: byte 16 is not UTF-8"):
        load(path)


@pytest.mark.parametrize(
    "override",
    ["a" * 100_000 + "=1", "a." * 50_000 + "b=1", "loss_fn._target_=" + "a." * 50_000 + "b",
     "dataset._target_=ds_kd.data." + "x" * 5000, "dataloader.collate_fn=" + "a.b" * 20_000],
    ids=range(5),
)  # fmt: skip
def test_a_name_that_never_ends_is_one_short_error_at_once(override, tmp_path):
    (tmp_path / "c.yaml").write_text(GOOD)
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml", [override])
    assert len(str(caught.value)) < 4000 and time.process_time() - started < 2


def test_only_the_part_of_a_long_line_around_the_key_is_shown(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + "rng: {" + " " * 20_000 + "sede: 1" + " " * 20_000 + "}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    line, caret = caught.value.text(excerpts=True).splitlines()[-2:]
    assert len(line) < 300 and line.index("sede") == caret.index("^")


def test_a_problem_shows_its_line_with_a_caret_on_a_terminal(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("rng:\n  sede: 1\n" + GOOD)
    kd = script("kd")
    words = ["--config", str(path), "--check", "rng.ranked=5"]
    assert kd.main(words) == 2
    plain = capsys.readouterr().err
    assert f"{path}:2:3: rng.sede: unknown key; did you mean rng.seed?" in plain
    assert "command line: rng.ranked: got 5" in plain and "^" not in plain
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert kd.main(words) == 2
    assert "        sede: 1\n        ^^^^\n" in capsys.readouterr().err


def test_secrets_are_shown_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    path = tmp_path / "c.yaml"
    path.write_text(
        GOOD + "wandb: {name: '${oc.env:MY_TOKEN}', token: hunter2, a: hf_hunter2hunter2hunter2, "
        "url: 'https://me:hunter2@host/x'}\n"
    )
    cfg = load(path)
    assert "hunter" not in cfg.text and "https://***@host/x" in cfg.text
    assert cfg.wandb["name"] == "hunter2"
    assert "hunter2" not in problem("model.token", "hunter2", "text")
