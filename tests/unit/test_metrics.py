"""Destinations of numbers: each step once; what Weights & Biases refuses is one line that names the
section."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from ds_kd.evaluate.comparison import read_lines
from ds_kd.evaluate.statistics import Estimate
from ds_kd.models.operations import Operations, count_operations
from ds_kd.train.clock import Clock, Counts
from ds_kd.train.layout import format_texts
from ds_kd.train.metrics import Metrics
from tests import tiny


def test_wandb_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb: the package is not installed; pip install wandb"):
        Metrics(None, wandb={"project": "p"})


def test_a_refusal_of_wandb_is_told(monkeypatch):
    client = types.ModuleType("wandb")
    client.init = lambda project=None: None
    monkeypatch.setitem(sys.modules, "wandb", client)
    Metrics(None, wandb={"project": "p"})
    with pytest.raises(ValueError, match=r"wandb: wandb\.init says: .*unexpected .*'projct'"):
        Metrics(None, wandb={"projct": "p"})


VALUES = {"train_loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_sec": 9.0}


def log(directory, steps, value=1.0, validated=(), resumed=None, run=1):
    """A run that logs these steps; what it says."""
    metrics = Metrics(directory, total_steps=9, out=io.StringIO())
    metrics.begin(run, resumed)
    for step in steps:
        metrics.train(step, {**VALUES, "train_loss": value})
        if step in validated:
            metrics.validation(step, {"loss": value})
    metrics.close()
    return metrics.out.getvalue()


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_logs_each_step_once(tmp_path):
    log(tmp_path, range(1, 7), value=1.0, validated=(4, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train_lo')  # torn by a kill
    log(tmp_path, range(5, 9), value=2.0, validated=(6,), resumed=4)

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
        metrics.begin(1, 4)
        metrics.validation(4, {"loss": value})
        metrics.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 4]
    assert records(tmp_path)[-1]["val_loss"] == 3.0


def test_a_run_that_begins_anew_sets_the_log_before_it_aside(tmp_path):
    log(tmp_path, (1, 2), value=1.0)
    log(tmp_path, (1,), value=2.0)
    assert [r["train_loss"] for r in records(tmp_path)] == [2.0]
    assert len((tmp_path / "metrics.before1.jsonl").read_text().splitlines()) == 2


def test_a_log_that_was_set_aside_is_never_replaced(tmp_path):
    for value in (1.0, 2.0, 3.0):
        log(tmp_path, (1,), value=value)
    (tmp_path / "metrics.before1.jsonl").unlink()  # of two, its user has removed the older one
    for value in (4.0, 5.0):
        log(tmp_path, (1,), value=value)
    kept = {path.name: path.read_text() for path in tmp_path.glob("metrics.before*")}
    assert len(kept) == 3 and '"train_loss": 2.0' in kept["metrics.before2.jsonl"]


def test_a_validation_at_step_0_of_another_run_is_not_the_new_ones(tmp_path):
    metrics = Metrics(tmp_path, total_steps=9, out=io.StringIO())
    metrics.validation(0, {"loss": 9.0})
    metrics.close()
    log(tmp_path, (1,), value=2.0)  # a run that does not validate at its start
    assert [r.get("train_loss") for r in records(tmp_path)] == [2.0]
    assert "9.0" in (tmp_path / "metrics.before1.jsonl").read_text()


def test_a_log_that_another_run_has_begun_is_set_aside_and_not_cut(tmp_path):
    """Two runs log into one directory, one after the other."""
    log(tmp_path, range(1, 5), value=1.0, run=1)
    log(tmp_path, range(1, 4), value=2.0, run=2)
    said = log(tmp_path, (5, 6), value=1.5, run=1, resumed=4)
    assert "metrics.jsonl was the log of another run; it is now metrics.before2.jsonl" in said
    log(tmp_path, (3,), value=2.5, run=2, resumed=2)
    kept = {path.name: path.read_text().splitlines() for path in tmp_path.glob("metrics.*")}
    steps = {name: [json.loads(line)["step"] for line in lines] for name, lines in kept.items()}
    assert steps == {
        "metrics.before1.jsonl": [1, 2, 3, 4],
        "metrics.before2.jsonl": [1, 2, 3],
        "metrics.before3.jsonl": [5, 6],
        "metrics.jsonl": [3],
    }
    # Its own log is its own, even if all of it is made again.
    assert "another run" not in log(tmp_path, (3, 4), run=2, resumed=2)
    assert [r["step"] for r in records(tmp_path)] == [3, 4]
    assert len([*tmp_path.glob("metrics.before*")]) == 3


def test_a_log_that_names_no_run_is_that_of_the_run_that_goes_on(tmp_path):
    lines = [json.dumps({"step": step, "train_loss": 9.0}) + "\n" for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    log(tmp_path, (4, 5, 6), resumed=3)
    assert [(r["step"], r["train_loss"]) for r in records(tmp_path)] == [
        (1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0), (6, 1.0)
    ]  # fmt: skip
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl") if "run" in r] == [4]


def test_a_run_that_begins_sets_a_log_aside_even_if_its_first_step_was_skipped(tmp_path):
    log(tmp_path, (1, 2, 3), value=1.0, run=1)
    log(tmp_path, (2, 3), value=2.0, run=2)
    assert [(r["step"], r["train_loss"]) for r in records(tmp_path)] == [(2, 2.0), (3, 2.0)]
    assert len((tmp_path / "metrics.before1.jsonl").read_text().splitlines()) == 3


def test_the_step_after_a_checkpoint_that_is_skipped_leaves_no_record_of_a_killed_run(tmp_path):
    log(tmp_path, (1, 2, 3, 4), value=1.0)
    log(tmp_path, (4, 5), value=2.0, resumed=2)  # step 3 was skipped this time
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 4, 5]


def test_a_run_that_only_validates_drops_nothing_but_the_validation_that_it_repeats(tmp_path):
    log(tmp_path, (1, 2, 3, 4), value=1.0, validated=(2, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train_lo')  # torn by a kill
    for value in (2.0, 3.0):
        metrics = Metrics(tmp_path, out=io.StringIO())
        metrics.begin(1, 2, only_validates=True)
        metrics.validation(2, {"loss": value}, texts=[{"student": "yes"}])
        metrics.evaluation(2, {"squad": {"f1": Estimate(value, 0.4, 0.6)}})
        metrics.close()
    seen = [next(name for name in r if name not in ("step", "run")) for r in records(tmp_path)]
    assert seen == [
        "train_loss", "train_loss", "val_samples", "val_loss", "eval_squad/f1",
        "train_loss", "train_loss", "val_loss",
    ]  # fmt: skip
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 2, 2, 2, 3, 4, 4]
    assert records(tmp_path)[3]["val_loss"] == records(tmp_path)[4]["eval_squad/f1"] == 3.0

    # The log of another run is not one to put a record into.
    metrics = Metrics(tmp_path, out=io.StringIO())
    metrics.begin(2, 4, only_validates=True)
    metrics.validation(4, {"loss": 5.0})
    metrics.close()
    assert records(tmp_path) == [{"step": 4, "run": 2, "val_loss": 5.0}]
    assert len((tmp_path / "metrics.before1.jsonl").read_text().splitlines()) == 8


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


def test_tensorboard_lays_out_the_tags_there_are_and_lists_settings_with_results(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams import plugin_data_pb2

    settings = {"kd_ratio": 0.5, "optimizer._target_": "torch.optim.AdamW", "fused": True}
    for steps in ((1, 2), (3,)):  # a resumed run writes a file of its own
        metrics = Metrics(tmp_path, out=io.StringIO(), settings=settings)
        metrics.begin(1, steps[0] - 1 or None)
        for step in steps:
            metrics.train(step, {**VALUES, "memory/rank_0": 1.0, "memory/rank_1": 2.0})
        metrics.validation(steps[-1], {"loss": 2.0}, {"squad": {"loss": 3.0}})
        metrics.evaluation(steps[-1], {"squad": {"f1": Estimate(0.5, 0.4, 0.6)}})
        metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    # The layout written last has the validation's curves, and none of what is not logged.
    (text,) = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    shown = {c.title: c for g in Layout.FromString(text).category for c in g.chart}
    charts = {title: [*chart.multiline.tag] for title, chart in shown.items()}
    (band,) = shown["squad, f1"].margin.series
    for tag, value in ((band.value, 0.5), (band.lower, 0.4), (band.upper, 0.6)):
        assert events.Scalars(tag)[-1].value == pytest.approx(value)
    assert charts["optimised loss, training and validation"] == [
        "^train_loss$", "^val_loss$", "^val_[^/]+/loss$"
    ]  # fmt: skip
    assert charts["peak memory of each rank, GiB"] == [r"^memory/rank_\d+$"]
    assert "cross-entropy" not in charts and "share of the peak (MFU)" not in charts

    def read(tag):
        plugin = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(plugin)

    found = read("session_start_info").session_start_info.hparams
    assert found["kd_ratio"].number_value == 0.5 and found["fused"].number_value == 1
    results = {info.name.tag for info in read("experiment").experiment.metric_infos}
    assert "val_loss" in results and events.Scalars("val_loss")[-1].value == 2.0
    assert read("session_end_info").session_end_info.status  # SUCCESS


def test_the_clock_adds_up_parts_and_begins_anew_when_read():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("teacher"):
            time.sleep(0.01)
    with clock.wait("data"):
        pass
    seconds = clock.read()
    assert seconds["teacher"] >= 0.02 > seconds["data"] >= 0 and clock.read() == {}


def test_rates_are_those_of_the_formula(tmp_path):
    """Weights of a Llama of width w, MLP m, k/v of half the width, tied head over v words."""
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path / "small"))
    large = AutoModelForCausalLM.from_pretrained(
        tiny.llama(tmp_path / "large", layers=3, hidden=64, tie=False)
    )

    def layers(count, w):  # q and o, k and v, the MLP's three, two norms; and a last norm
        return count * (2 * w * w + 2 * w * w // 2 + 3 * w * 2 * w + 2 * w) + w

    operations = count_operations(small, large, torch.device("cpu"))
    assert operations.per_token == 6 * layers(2, 32) + 2 * layers(3, 64)
    assert operations.per_label == 6 * 96 * 32 + 2 * 96 * 64 and operations.peak is None
    small.requires_grad_(False)  # as under LoRA
    assert count_operations(small, None, torch.device("cpu")).per_token == 4 * layers(2, 32)

    counts = Counts(labels=10, tokens=40, slots=50, samples=4, shared=0, memory=(1.0, 2.0))
    told = counts.describe(2.0, {"teacher": 0.5}, Operations(1e12, 2e12, 1e14))
    # 40 + 2·10 = 60 · 10¹² operations in 2 s on 2 ranks: 15 TFLOP/s each, of a peak of 100.
    assert told == {
        "tokens_per_sec": 20.0, "padding": pytest.approx(0.2), "supervised": 0.25,
        "throughput/samples_per_sec": 2.0, "throughput/tflops_per_rank": 15.0,
        "throughput/mfu": pytest.approx(0.15), "time/step": 2.0, "time/teacher": 0.5,
        "memory/rank_0": 1.0, "memory/rank_1": 2.0,
    }  # fmt: skip


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_progress_bar_and_a_log_the_same_lines_as_ever(monkeypatch):
    told = {}
    for kind in (io.StringIO, _Terminal):
        out, err = io.StringIO(), kind()
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "stdout", out)  # one terminal: each line is written above the bar
        metrics = Metrics(None, total_steps=6)
        for step in (3, 4):  # resumed
            metrics.train(step, VALUES)
        metrics.validation(4, {"loss": 1.0})
        metrics.close()
        told[kind] = out.getvalue(), err.getvalue()
    lines = [re.sub("left.*", "", out) for out, _ in told.values()]
    assert lines[0] == lines[1] and "step 4/6" in lines[0] and "validation after" in lines[0]
    assert told[io.StringIO][1] == ""
    assert "3/6" in told[_Terminal][1] and "loss=1.0000" in told[_Terminal][1]


def test_answers_are_shown_as_they_are_whatever_marks_they_hold():
    import markdown  # with which TensorBoard renders texts

    answer = "a * b * c | `d` <b>e</b> & [f](g) # h _i_\\nj"
    shown = markdown.markdown(format_texts([{"student": answer}]), extensions=["tables"])
    (cell,) = re.findall(r"<td>student</td>\s*<td>(.*?)</td>", shown, flags=re.DOTALL)
    assert html.unescape(cell) == answer
    assert "<td>(nothing)</td>" in markdown.markdown(
        format_texts([{"student": ""}]), extensions=["tables"]
    ).replace("\\", "")
