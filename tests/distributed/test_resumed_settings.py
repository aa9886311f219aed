"""The YAML's words on the optimizer and its schedule hold after a resume; what it does not
change stays as it was, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_kd.checkpoint.retention import best_in
from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.config.sections import LRScheduler
from ds_kd.evaluate.statistics import Estimate
from ds_kd.parallel.signals import StopRequest
from ds_kd.parallel.world import barrier
from ds_kd.recipe.optimizer import build_schedule
from ds_kd.recipe.run import _resume
from ds_kd.train.metrics import Metrics
from tests import tiny
from tests.parity.test_step import build, weights
from tests.ranks import run_ranks

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
LINEAR = LRScheduler(name="linear")
SHOWN = ("train_loss", "learning_rate", "grad_norm", "tokens_per_sec")
SLOW = 0.5  # seconds that a micro-batch takes to load
OLD = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0}
NEW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def prepare(world, paths, directory, steps, optimizer, schedule=LINEAR):
    """A trainer that keeps what it has every third step."""
    from ds_kd.checkpoint.checkpointer import Checkpointer
    from ds_kd.checkpoint.writer import Writer

    directory.mkdir(exist_ok=True)
    made = build(
        world, paths, tiny.samples(12, seed=5), 1, 4 // world.size, 0.5, optimizer,
        lr_scheduler=build_schedule(schedule, steps),
        num_epochs=9, max_steps=steps, ckpt_every_steps=3,
    )  # fmt: skip
    made.validation.loaders = {}
    tokenizer = tiny.tokenizer(directory.parent / f"tokenizer{world.rank}")
    made.checkpointer = Checkpointer(
        directory, Writer(world, tokenizer), "false", say=lambda *_: None
    )
    return made


def train(made):
    """Resume and train; the learning rate of each step, and the optimizer's settings."""
    rates, log = [], made.metrics.train

    def note(step, values):
        rates.append(values["learning_rate"])
        return log(step, values)

    made.metrics.train = note
    made.checkpointer.resume(made.student, made.state)
    assert made.train()
    group = made.student.optimizer.optimizer.param_groups[0]
    return {"rates": rates, **{name: group.get(name) for name in ("betas", "eps", "weight_decay")}}


def speeds_of_a_slow_loader(made):
    """For each step, tokens per second as logged and as it takes to load them at least."""
    collate, log, speeds = made.batches.loader.collate_fn, made.metrics.train, []

    def load(samples):
        time.sleep(SLOW)
        return collate(samples)

    def note(step, values):
        possible = made.state.tokens / len([*speeds, None]) / SLOW
        speeds.append([values["tokens_per_sec"], possible])
        return log(step, values)

    made.batches.loader.collate_fn, made.metrics.train = load, note
    assert made.train()
    return speeds


def refusal(made):
    from ds_kd.checkpoint.checkpointer import CheckpointError

    try:
        made.checkpointer.resume(made.student, made.state)
    except CheckpointError as error:
        return str(error)
    return ""


def adamw(**settings):
    return functools.partial(torch.optim.AdamW, **settings)


def on_one_rank(world, root, paths):
    out = {}
    straight = prepare(world, paths, root / "straight", 6, adamw(**OLD))
    out["straight"] = train(straight)

    (root / "again").mkdir()
    shutil.copytree(root / "straight" / "step_0000003", root / "again" / "step_0000003")
    shutil.copytree(root / "again", root / "spread")
    again = prepare(world, paths, root / "again", 6, adamw(**OLD))
    out["again"] = train(again)
    ours, theirs = weights(straight.student), weights(again.student)
    out["bitwise"] = all(torch.equal(ours[name], theirs[name]) for name in ours)

    train(prepare(world, paths, root / "done", 3, adamw(**OLD)))
    shutil.copytree(root / "done", root / "plain", symlinks=True)
    out["changed"] = train(prepare(world, paths, root / "done", 6, adamw(**NEW)))
    out["no schedule"] = train(prepare(world, paths, root / "plain", 5, adamw(**NEW), None))

    out["speeds"] = speeds_of_a_slow_loader(prepare(world, paths, root / "slow", 2, adamw(**OLD)))

    out["measured"] = ended_and_measured_otherwise(world, root, paths)
    out["looked at"] = looked_at(world, root, paths)
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    train(prepare(world, paths, root / "other", 3, momentum))
    out["other optimizer"] = refusal(prepare(world, paths, root / "other", 6, adamw(**OLD)))
    return out


def on_two_ranks(world, root, paths):
    extra = prepare(world, paths, root / "spread", 6, adamw(**OLD, amsgrad=True))
    nadam = functools.partial(torch.optim.NAdam, lr=0.01)
    out = {"amsgrad": refusal(extra)}
    out["nadam"] = refusal(prepare(world, paths, root / "spread", 6, nadam))
    out["of sgd"] = refusal(prepare(world, paths, root / "other", 6, adamw(**OLD)))
    out["changed"] = train(prepare(world, paths, root / "spread", 6, adamw(**NEW)))

    clock = prepare(world, paths, root / "clock", 2, adamw(**OLD))
    clock.save_every_seconds = 0.0 if world.is_main else None  # only rank 0's clock counts
    assert clock.train()
    out["clock"] = sorted(path.name for path in (root / "clock").glob("step_*"))

    return out | broken_off(world, root, paths) | ended_early(world, root, paths)


def ended_and_measured_otherwise(world, root, paths):
    """Return what each start of a run that patience ended says, and the steps at which it begins
    and ends."""
    cfg = load(GUIDE, [f"checkpoint.checkpoint_dir={root / 'measured'}"])

    def start(patience, kd_ratio, data):
        made = prepare(world, paths, root / "measured", 9, adamw(lr=0.0))
        made.validation.loaders = {"": made.batches.loader}
        made.schedule = replace(made.schedule, val_every_steps=1, patience=patience)
        course = {"kd_ratio": kd_ratio, "step_scheduler.patience": patience}
        made.checkpointer.settings.fingerprint = course
        made.checkpointer.settings.validation = {"kd_ratio": kd_ratio, "validation data": data}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                _resume(cfg, made, None)
            except ConfigError as error:
                return str(error)
        began = made.state.step
        assert made.train()
        return [began, made.state.step, said.getvalue()]

    first = start(2, 0.5, "a")
    return [first, start(1, 0.5, "a"), start(2, 0.9, "a"), start(2, 0.5, "b")]


def looked_at(world, root, paths):
    """Return the files of a run that stopped after step 4, before and after validations alone, with
    their log; and the runs' numbers."""
    directory = root / "looked at"
    cfg = load(GUIDE, [f"checkpoint.checkpoint_dir={directory}"])

    def start(most, data, end):
        made = prepare(world, paths, directory, 9, adamw(**OLD))
        made.checkpointer.save_consolidated = "final"
        made.checkpointer.settings.validation = {"validation data": data}
        made.validation.loaders = {"": made.batches.loader}
        made.schedule = replace(made.schedule, max_steps=most, val_every_steps=2, patience=1 + most)
        made.metrics = Metrics(directory / "log", tensorboard=False, out=io.StringIO())
        _resume(cfg, made, None)
        made.asked_to_stop = lambda: made.state.step == end
        made.train()
        return made

    def read():
        files = [p for p in directory.rglob("*") if p.is_file() and p.parent.name != "log"]
        links = {name: str((directory / name).readlink()) for name in ("LATEST", "BEST")}
        return {str(p): p.read_bytes() for p in files} | links

    # A killed run has left the record of a step after the checkpoint.
    made = start(9, "a", 4)
    made.metrics.evaluation(4, {"squad": {"f1": Estimate(0.5, 0.4, 0.6)}})
    made.metrics.train(5, dict.fromkeys(SHOWN, 1.0))
    made.metrics.close()
    assert made.checkpointer.newest().name == "step_0000004"
    before, runs = read(), [made.checkpointer.course.run]
    for _ in range(2):
        runs.append(start(0, "b", None).checkpointer.course.run)
    log = (directory / "log" / "metrics.jsonl").read_text().splitlines()
    kinds = [
        [r["step"], next(n for n in r if n not in ("step", "run"))] for r in map(json.loads, log)
    ]
    return [
        before == read(),
        [*directory.glob("final")],
        kinds,
        runs,
        len([*directory.glob("log/*")]),
    ]


def broken_off(world, root, paths):
    """A run of which rank 1 is asked to stop while it validates."""
    made = prepare(world, paths, root / "broken", 6, adamw(**OLD))
    made.validation.loaders = {"": made.batches.loader}
    made.schedule = replace(made.schedule, val_every_steps=1)
    stop = StopRequest()

    def look():
        if world.rank == 1 and not made.student.module.training:
            stop.received = signal.SIGTERM
        return stop()

    made.asked_to_stop = look
    finished = made.train().finished
    validated = "validation" in made.metrics.out.getvalue()
    out = {"broken off": [finished, made.state.step], "validated": validated}

    # The run that goes on makes that validation, of the checkpoint that is already there.
    again = prepare(world, paths, root / "broken", 1, adamw(**OLD))
    again.validation.loaders = {"": again.batches.loader}
    again.schedule = replace(again.schedule, val_every_steps=1)
    again.checkpointer.resume(again.student, again.state)
    best = root / "broken" / "BEST"
    before = best.is_symlink()
    assert again.train()
    barrier(world)  # rank 0 has noted it
    out["noted"] = [before, best.resolve().name, best_in(best.parent)[0].name]
    return out


def ended_early(world, root, paths):
    """A run whose validation loss does not fall, and what starting it again makes of it."""
    out = {}
    for patience in (2, 4):
        made = prepare(world, paths, root / "patient", 9, adamw(lr=0.0))
        made.validation.loaders = {"one": made.batches.loader, "other": made.batches.loader}
        made.schedule = replace(made.schedule, val_every_steps=1, patience=patience)
        if patience == 2:
            made.checkpointer.save_consolidated = "final"
        else:
            made.checkpointer.resume(made.student, made.state)
        began = made.state.step, made.is_done
        finished = made.train().finished
        student = (root / "patient" / "final" / "model.safetensors").is_file()
        out[f"patience {patience}"] = [*began, finished, made.state.step, student]
        said = made.metrics.out.getvalue().splitlines()
        out["told"] = [line.partition("loss of")[0] for line in said if "ends here" in line]
        out["sets"] = [line.strip().partition(":")[0] for line in said if line.startswith("  ")][:2]
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.fixture(scope="module")
def paths(root):
    return {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }


@pytest.fixture(scope="module")
def one(root, paths):
    return run_ranks(on_one_rank, 1, root, paths)[0]


@pytest.fixture(scope="module")
def two(one, root, paths):
    return run_ranks(on_two_ranks, 2, root, paths)


def test_a_run_that_patience_ended_says_so_and_goes_on_where_other_data_are_validated(one):
    first, same, refused, other = one["measured"]
    assert first == [0, 3, ""]
    # A lower patience is no other course of the run.
    assert same[:2] == [3, 3]
    assert "the run is done at step 3; a larger step_scheduler.patience goes on" in same[2]
    assert "kd_ratio was 0.5 and is 0.9" in refused
    assert "with a larger step_scheduler.patience the finished run goes on" in refused
    # The first validation of other data lowers what is known of them; two more do not.
    assert other[:2] == [3, 6]
    assert "validation measures something else than before (validation data)" in other[2]


def test_a_run_of_no_steps_changes_nothing_but_the_validation_in_the_log(one):
    """Its losses are of other data: as those of the checkpoint they would decide what is kept."""
    same, final, log, runs, logs = one["looked at"]
    assert same and not final and logs == 1
    assert log == [
        [1, "train_loss"], [2, "train_loss"], [2, "val_loss"], [3, "train_loss"],
        [4, "train_loss"], [4, "val_loss"], [4, "eval_squad/f1"], [5, "train_loss"],
    ]  # fmt: skip
    assert len(set(runs)) == 1 and runs[0] > 0


def linear(lr, first, total):
    return [lr * (1 - step / total) for step in range(first, total)]


def test_with_nothing_changed_a_resume_is_bitwise_and_keeps_every_rate(one):
    assert one["straight"]["rates"] == pytest.approx(linear(0.01, 0, 6), rel=1e-12)
    assert one["again"]["rates"] == one["straight"]["rates"][3:]
    assert one["bitwise"]


def test_tokens_per_second_count_the_time_of_loading(one):
    assert len(one["speeds"]) == 2
    # The mean of the steps so far stands for each: they are alike within a third.
    assert all(0 < logged <= 1.5 * possible for logged, possible in one["speeds"])


def test_a_lengthened_run_takes_its_settings_and_rates_from_the_yaml(one):
    # The finished run's own last rate is 0.
    assert one["changed"]["rates"] == pytest.approx(linear(0.02, 3, 6), rel=1e-12)
    assert one["no schedule"]["rates"] == [0.02, 0.02]
    for name in ("betas", "eps", "weight_decay"):
        expected = list(NEW[name]) if name == "betas" else NEW[name]
        assert one["changed"][name] == one["no schedule"][name] == expected


def test_another_number_of_ranks_takes_them_from_the_yaml_too(two):
    assert two[0]["changed"] == two[1]["changed"]
    assert two[0]["changed"]["rates"] == pytest.approx(linear(0.02, 3, 6), rel=1e-12)
    assert two[0]["changed"]["weight_decay"] == NEW["weight_decay"]


def test_the_states_of_another_optimizer_are_refused_naming_what_lacks(one):
    assert "of another optimizer, without the step of AdamW" in one["other optimizer"]


def test_optimizers_that_cannot_change_their_number_of_ranks_say_so_on_every_rank(two):
    assert two[0] == two[1]
    assert "was saved by 1 ranks, and the max_exp_avg_sq of this optimizer" in two[0]["amsgrad"]
    assert "and the mu_product of this optimizer cannot be resharded" in two[0]["nadam"]
    assert "only optimizers of Adam's family can go on" in two[0]["of sgd"]
    assert not any("does not fit" in text for text in two[0].values() if isinstance(text, str))


def test_a_checkpoint_is_saved_by_rank_0s_clock(two):
    assert two[1]["clock"] == ["step_0000001", "step_0000002"]


def test_a_signal_during_validation_does_not_wait_for_its_end(two):
    assert two[0]["broken off"] == two[1]["broken off"] == [False, 1]
    assert two[0]["noted"] == [False, "step_0000001", "step_0000001"]
    assert not two[0]["validated"] and not two[1]["validated"]


def test_patience_ends_a_run_that_goes_on_when_it_is_raised(two):
    # Nothing is learnt at a rate of 0: of the validations of steps 1 to 3 two lower nothing.
    assert two[0]["patience 2"] == [0, False, True, 3, True]
    assert two[0]["patience 4"] == [3, False, True, 5, True]
    told = "ends here: the last 4 validations have not lowered the validation "
    assert two[0]["told"] == [told]


def test_each_validation_set_is_told_by_its_name(two):
    assert two[0]["sets"] == ["one", "other"]
