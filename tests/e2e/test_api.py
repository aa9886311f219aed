"""The work of launch/kd.py, from Python: `load_config`, `build`, `train`, more than once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment

SCRIPT = """
import json, sys
import ds_kd
from pathlib import Path

assert not {"torch", "deepspeed"} & set(sys.modules)
guide, root, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]

def config(directory, *more):
    place = f"checkpoint.checkpoint_dir={root / directory}"
    return ds_kd.load_config(guide, [*overrides, place, *more])

def run(directory, *more):
    with ds_kd.build(config(directory, *more)) as trainer:
        began = trainer.state.step
        summary = trainer.train()
        loss = trainer.validate()["loss"]
        assert summary.validation["loss"] == loss and summary.lowest_loss <= loss
        assert summary.training["train_loss"] > 0 and summary.checkpoint.name.startswith("step_")
        assert (root / directory / "RUNNING").exists()
    assert not (root / directory / "RUNNING").exists()
    return [began, summary.step, summary.finished, loss]

runs = [run("one", "step_scheduler.max_steps=1"), run("one"), run("two")]

# The shipped run of a base that teaches itself, at a small scale.
words = [word for word in overrides if not word.startswith("teacher_model")]
place = f"checkpoint.checkpoint_dir={root / 'shared'}"
small = ["packed_sequence.packed_sequence_size=96", "step_scheduler.local_batch_size=2"]
small += ["step_scheduler.num_epochs=2", "step_scheduler.val_every_steps=null"]
small += ["step_scheduler.val_samples=1"]
small += [f"evaluation={{tasks: [{{task: kl, data: {root}/rows.jsonl}}]}}"]
shared = ds_kd.load_config("ds_configs/runs/shared_base_lora.yaml", [*words, place, *small])
with ds_kd.build(shared) as trainer:
    trainer.train()
    runs.append([trainer.state.step, trainer.validate()["kd_loss"]])

# A second adapter on the same base learns from the first one, which is frozen, and goes on.
under = [*words, *small[:2], f"checkpoint.checkpoint_dir={root / 'under'}", "kd_ratio=1"]
under += ["step_scheduler.num_epochs=9", "step_scheduler.val_every_steps=1"]
under += [f"teacher.adapter={root / 'shared/LATEST/adapter'}"]
for steps in (1, 4):
    length = f"step_scheduler.max_steps={steps}"
    made = ds_kd.load_config("ds_configs/runs/shared_base_lora.yaml", [*under, length])
    with ds_kd.build(made) as trainer:
        trainer.train()
        runs.append([trainer.state.step, trainer.validate()["kd_loss"]])

# The shipped run on a cache: its teacher is run once by the command, and is then away.
from tests.scripts import script
example = "ds_configs/runs/cached_teacher.yaml"
kept = [*overrides, *small[:2], f"checkpoint.checkpoint_dir={root / 'cached'}"]
kept += [f"teacher.directory={root / 'cache'}"]
assert script("cache_teacher").main(["--config", example, *kept]) == 0
(root / "teacher").rename(root / "away")
words = [word for word in kept if not word.startswith("teacher_model")]
alone = ["teacher_model=null", "teacher.fill=false"]
with ds_kd.build(ds_kd.load_config(example, [*words, *alone])) as trainer:
    trainer.train()
    runs.append([trainer.state.step, trainer.validate()["kd_loss"]])
(root / "away").rename(root / "teacher")

# The shipped run on the student's own words, at a small scale.
place = f"checkpoint.checkpoint_dir={root / 'on_policy'}"
small = ["packed_sequence.packed_sequence_size=96", "rollouts.max_new_tokens=8"]
small += ["step_scheduler.val_every_steps=null", "step_scheduler.val_at_start=false"]
mine = ds_kd.load_config("ds_configs/runs/on_policy.yaml", [*overrides, place, *small])
with ds_kd.build(mine) as trainer:
    trainer.train()
lines = (root / "on_policy" / "tensorboard" / "metrics.jsonl").read_text().splitlines()
runs.append([json.loads(line) for line in lines if "rollouts/count" in line])

# A build that fails gives back what it holds; a signal ends a run that listens.
try:
    ds_kd.build(config("one", "kd_ratio=0.1"))
except ds_kd.errors.UserError as error:
    runs.append(str(error))
assert not (root / "one" / "RUNNING").exists()

# Every divergence trains, all in one sum; another sum is another run.
from ds_kd.config.signatures import divergences_by_name
def summed(weight):
    parts = [{'name': name, 'weight': weight} for name in divergences_by_name()]
    next(part for part in parts if part["name"] == "hidden_states")["layers"] = [[0, 2]]
    return f"kd_loss_fn={parts}"
steps = ["step_scheduler.max_steps=1", "step_scheduler.val_at_start=true"]
runs.append(run("four", summed(0.1), *steps))
try:
    ds_kd.build(config("four", summed(0.2), *steps))
except ds_kd.errors.UserError as error:
    runs.append(str(error))

import os, signal
trainer = ds_kd.build(config("three"), listens=True)
os.kill(os.getpid(), signal.SIGUSR1)
stopped = trainer.train()
runs.append([stopped.finished, stopped.step, (root / "three" / "PREEMPTED").read_text()])
trainer.close()
print(json.dumps(runs))
"""


def test_a_run_is_built_trained_and_closed_again_and_again_in_one_process(tmp_path):
    tiny.llama(tmp_path / "student", seed=1)
    tiny.llama(tmp_path / "teacher", layers=3, hidden=64, tie=False, seed=2)
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(22))
    rows = f"{{_target_: ds_kd.data.squad.make_squad_dataset, dataset_name: {tmp_path}/rows.jsonl}}"
    overrides = [
        f"model.pretrained_model_name_or_path={tmp_path / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={tmp_path / 'teacher'}",
        f"dataset={rows}",
        f"validation_dataset={rows}",
        "dist_env.backend=gloo",
        "step_scheduler.global_batch_size=8",
        "step_scheduler.max_steps=2",
        "optimizer.lr=0.01",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, GUIDE, str(tmp_path), *overrides],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    first, resumed, straight, shared, early, late, cached, own, *told = made
    refused, summed, other, stopped = told
    assert first[:3] == [0, 1, True] and resumed[:3] == [1, 2, True] and straight[0] == 0
    assert resumed[3] == straight[3] < first[3]
    records = (tmp_path / "shared/tensorboard/metrics.jsonl").read_text().splitlines()
    kl = [each["kd_loss"] for each in map(json.loads, records) if "kd_loss" in each]
    assert shared[0] == 2 and shared[1] > 1e-4, shared  # the adapter has moved away from the base
    assert kl[0] < 1e-6 < kl[1], kl  # at first it changes nothing
    last = {tag: v for each in map(json.loads, records) for tag, v in each.items()}
    assert last["eval_kl/forward_kl"] == pytest.approx(last["val_kl_at_t1"], rel=1e-4)
    shown = [s for each in map(json.loads, records) for s in each.get("val_samples", [])]
    assert shown and {"prompt", "reference", "teacher", "student"} == {*shown[0]}
    assert early[0] == 1 and late[0] == 4 and late[1] < early[1], (early, late)
    card = (tmp_path / "under/final/README.md").read_text()
    assert "the model it started from, under the adapter" in card
    assert cached[0] == 2 and cached[1] > 0.1, cached
    assert len(own) == 2 and "kd_loss" in own[0] and own[0]["rollouts/count"] >= 1
    assert {"prompt", "student"} == {*own[0]["rollouts/texts"][0]}
    assert "kd_ratio was 0.5 and is 0.1" in refused
    assert summed[1:3] == [1, True] and "kd_loss_fn was [{" in other
    log = tmp_path / "four" / "tensorboard" / "metrics.jsonl"
    before, _, after = (json.loads(line) for line in log.read_text().splitlines()[:3])
    assert after["val_kd_loss"] < before["val_kd_loss"]
    assert after["val_acceptance_at_t1"] > before["val_acceptance_at_t1"]
    assert after["val_reverse_kl_at_t1"] < before["val_reverse_kl_at_t1"]
    assert stopped == [False, 1, "preempted at step 1\n"]
