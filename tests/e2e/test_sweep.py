"""A sweep makes the runs that are not made yet, and compares all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_kd.checkpoint.run_lock import RunLock
from ds_kd.config.components import ConfigError
from ds_kd.plan.sweep import _split, lay_out
from ds_kd.recipe.results import mark_without_checkpoints
from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment
from tests.scripts import heed_signals


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert _split("0,0.5,1") == ["0", "0.5", "1"]
    assert _split("[[1,2],[3]],{a: [1,2], b: 3}") == ["[[1,2],[3]]", "{a: [1,2], b: 3}"]
    assert _split('"a,b"') == ['"a,b"'] and _split("") == [""] and _split("[1") == ["[1"]


def test_the_runs_are_all_combinations_each_in_its_directory_and_all_are_checked():
    words = ["kd_ratio=0.5,1", "kd_loss_fn.temperature=1,2", "checkpoint.checkpoint_dir=here"]
    runs = lay_out(str(ROOT / GUIDE), words, ())
    assert [(run.cfg.kd_ratio, run.cfg.kd_loss_fn.kwargs["temperature"]) for run in runs] == [
        (0.5, 1), (0.5, 2), (1, 1), (1, 2)
    ]  # fmt: skip
    last = runs[-1].cfg
    assert last.checkpoint.checkpoint_dir == "here/kd_ratio=1_kd_loss_fn.temperature=2"
    assert last.tensorboard_dir == f"{last.checkpoint.checkpoint_dir}/tensorboard"
    with pytest.raises(ConfigError, match="kd_ratio"):
        lay_out(str(ROOT / GUIDE), ["kd_ratio=0.5,7"], ())
    with pytest.raises(ConfigError, match="nothing varies"):
        lay_out(str(ROOT / GUIDE), ["kd_ratio=0.5"], ())
    with pytest.raises(ConfigError, match="two runs would be in"):
        lay_out(str(ROOT / GUIDE), ["kd_ratio=0.5,0.5"], ())
    with pytest.raises(ConfigError, match=r"kd_ratio=0.5 and kd_ratio=0.50 are the same run"):
        lay_out(str(ROOT / GUIDE), ["kd_ratio=0.5,1,0.50"], ())
    sizes = ["step_scheduler.global_batch_size=4,8", "step_scheduler.local_batch_size=1"]
    with pytest.raises(ConfigError, match=r"global_batch_size: got 4, .*3 ranks = 3; write 6"):
        lay_out(str(ROOT / GUIDE), sizes, (), ranks=3)


def test_a_run_without_checkpoints_that_a_signal_stopped_is_not_finished(tmp_path):
    words = ["kd_ratio=0.5,1", f"checkpoint.checkpoint_dir={tmp_path}", "checkpoint.enabled=false"]
    run, _ = lay_out(str(ROOT / GUIDE), words, ())
    Path(run.cfg.tensorboard_dir).mkdir(parents=True)
    mark_without_checkpoints(run.cfg, 3, finished=False)
    assert run.was_stopped
    mark_without_checkpoints(run.cfg, 5, finished=True)
    assert not run.was_stopped


#: The effect of a sweep on a run, and of a run on its requests; the second word says if it has
#: both.
SENDER = """
import sys
from ds_kd.parallel.signals import StoppableCommands
commands = StoppableCommands()
print(commands.run([sys.executable, "-c", sys.argv[1]]), commands.is_asked, flush=True)
"""
LISTENER = """
import time
from ds_kd.parallel.signals import StopRequest
stop = StopRequest()
stop.listen()
print("ready", flush=True)
while not stop():
    time.sleep(0.02)
time.sleep(0.5)  # a second request would end it here
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_request_to_stop_reaches_the_run_once_and_is_waited_for(number, to_group):
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER, LISTENER], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed_signals,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.stdout.read() == "saved\n0 True\n" and process.wait() == 0


def test_the_command_leaves_out_finished_runs_goes_on_after_failed_ones_and_ends_in_a_table(
    tmp_path,
):
    tiny.llama(tmp_path / "model", seed=1)
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(8))
    rows = f"{{_target_: ds_kd.data.squad.make_squad_dataset, dataset_name: {tmp_path}/rows.jsonl}}"
    words = [
        "kd_ratio=0,0.5,1",
        f"model.pretrained_model_name_or_path={tmp_path / 'model'}",
        f"teacher_model.pretrained_model_name_or_path={tmp_path / 'model'}",
        *(f"dataset={rows}", f"validation_dataset={rows}"),
        *("step_scheduler.global_batch_size=4", "step_scheduler.max_steps=1"),
        f"checkpoint.checkpoint_dir={tmp_path / 'runs'}",
    ]
    # The first is finished; the directory of the second is in use, so that it fails.
    first, second, third = lay_out(str(ROOT / GUIDE), words, ())
    log = first.mark.parent / "tensorboard" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"step": 1, "val_loss": 3.0, "val_ce_loss": 3.25}) + "\n")
    first.mark.write_text(first.cfg.text)
    second.mark.parent.mkdir()
    lock = RunLock(second.mark.parent)
    lock.take()
    done = subprocess.run(
        [sys.executable, "launch/sweep.py", "--config", GUIDE, *words],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=480, check=False,
    )  # fmt: skip
    lock.release()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "[1/3] kd_ratio=0, finished before" in done.stdout
    assert "Traceback" not in done.stderr and "another directory" in done.stderr
    *_, one, two, three, failed = done.stdout.splitlines()
    assert one.split() == ["kd_ratio=0", "3.2500", "-", "-", "-"]
    assert two.split() == ["kd_ratio=0.5", "-", "-", "-", "-"]
    assert three.startswith("kd_ratio=1 ") and "-" not in three
    assert failed == "failed: kd_ratio=0.5"
    assert third.mark.read_text() == third.cfg.text and not second.mark.exists()
