"""Where numbers go: each step once; what Weights & Biases refuses is one line that names the
section."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ds_kd.train.metrics import Metrics


def test_wandb_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb: the package is not installed; pip install wandb"):
        Metrics(None, wandb={"project": "p"})


def test_what_wandb_refuses_is_told(monkeypatch):
    client = types.ModuleType("wandb")
    client.init = lambda project=None: None
    monkeypatch.setitem(sys.modules, "wandb", client)
    Metrics(None, wandb={"project": "p"})
    with pytest.raises(ValueError, match=r"wandb: wandb\.init says: .*unexpected .*'projct'"):
        Metrics(None, wandb={"projct": "p"})


VALUES = {"train_loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_sec": 9.0}


def log(directory, steps, value=1.0, validated=()):
    """A run that logs these steps."""
    metrics = Metrics(directory, total_steps=9, out=io.StringIO())
    for step in steps:
        metrics.train(step, {**VALUES, "train_loss": value})
        if step in validated:
            metrics.validation(step, {"loss": value})
    metrics.close()


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_logs_each_step_once(tmp_path):
    log(tmp_path, range(1, 7), value=1.0, validated=(4, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train_lo')  # torn by a kill
    log(tmp_path, range(5, 9), value=2.0, validated=(6,))  # from the checkpoint of step 4

    train = [(r["step"], r["train_loss"]) for r in records(tmp_path) if "train_loss" in r]
    assert train == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 9)]
    assert [(r["step"], r["val_loss"]) for r in records(tmp_path) if "val_loss" in r] == [
        (4, 1.0),
        (6, 2.0),
    ]
    assert [path.name for path in tmp_path.glob("*metrics*")] == ["metrics.jsonl"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = [(point.step, point.value) for point in events.Scalars("train_loss")]
    assert curve == train


def test_a_validation_made_after_a_resume_keeps_its_step(tmp_path):
    log(tmp_path, range(1, 5), value=1.0)
    for value in (2.0, 3.0):  # the second time it takes the place of the first
        metrics = Metrics(tmp_path, total_steps=9, out=io.StringIO())
        metrics.validation(4, {"loss": value})
        metrics.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 4]
    assert records(tmp_path)[-1]["val_loss"] == 3.0


def test_a_run_that_begins_anew_sets_the_log_before_it_aside(tmp_path):
    log(tmp_path, (1, 2), value=1.0)
    log(tmp_path, (1,), value=2.0)
    assert [r["train_loss"] for r in records(tmp_path)] == [2.0]
    assert len((tmp_path / "metrics.before1.jsonl").read_text().splitlines()) == 2


def test_no_name_of_a_validation_set_takes_the_tags_of_another(tmp_path):
    """`ce` with its loss is not the mean's `ce_loss`, nor `a` with `ce_loss` the loss of `a_ce`."""
    metrics = Metrics(tmp_path, out=io.StringIO())
    names = ["ce", "kd", "a", "a_ce"]
    sets = {name: {"loss": 10.0 + k, "ce_loss": 20.0 + k} for k, name in enumerate(names)}
    metrics.validation(3, {"loss": 1.0, "ce_loss": 2.0}, sets)
    metrics.close()
    (record,) = records(tmp_path)
    assert record["val_loss"] == 1.0 and record["val_ce_loss"] == 2.0
    for name, values in sets.items():
        assert {tag: record[f"val_{name}/{tag}"] for tag in values} == values


def test_a_log_that_is_not_gone_on_with_stays_as_it_is(tmp_path):
    log(tmp_path, (1, 2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Metrics(tmp_path, out=io.StringIO()).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_log_that_cannot_be_written_is_said_once_and_costs_no_step(tmp_path):
    """Files may have 4 KiB, as on a disk that is full after them."""
    script = f"""if True:
        from pathlib import Path
        from ds_kd.train.metrics import Metrics
        metrics = Metrics(Path({str(tmp_path)!r}), True, "x" * 3000, None, 99)
        values = dict.fromkeys(["learning_rate", "grad_norm", "tokens_per_sec", "train_loss"], 1.0)
        for step in range(1, 100):
            metrics.train(step, values)
            if metrics._writer is not None:
                try:
                    metrics._writer.flush()
                except OSError:  # its thread has met the end of the disk
                    pass
        metrics.close()"""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "_", sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("metrics.jsonl cannot be written (") == 1, done.stdout
    assert done.stdout.count("TensorBoard's events cannot be written (") == 1
    assert "step 99/99" in done.stdout
