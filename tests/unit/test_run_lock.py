"""One run per checkpoint directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_kd.checkpoint.run_lock import NAME, DirectoryInUse, RunLock
from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.parallel.world import World
from ds_kd.recipe.results import marker_of
from ds_kd.recipe.run import lock_directories

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from ds_kd.checkpoint.run_lock import RunLock\n"
    "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def on_another_machine(path: Path) -> None:
    """The same file, as a holder that cannot be looked up here would have written it."""
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "machine": ["far", "away", "x"], "host": "far"})
    )


def test_a_second_run_is_told_who_has_the_directory_and_what_to_do(tmp_path, holder):
    with pytest.raises(DirectoryInUse) as refused:
        RunLock(tmp_path).take()
    words = str(refused.value)
    assert str(holder.pid) in words and socket.gethostname() in words
    assert "another directory" in words and f"kill {holder.pid}" in words


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_runs_successor_starts_at_once(tmp_path, holder, reaped):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    started = time.monotonic()
    lock = RunLock(tmp_path)
    lock.take()
    assert time.monotonic() - started < 10  # a stale holder is watched for longer
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_a_process_number_that_was_given_out_again_is_not_the_holder(tmp_path, holder):
    path = tmp_path / NAME
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "process_started": said["process_started"] - 1}))
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_holder_on_another_machine_is_refused_while_it_gives_signs_and_taken_over_after(tmp_path):
    other = RunLock(tmp_path, heartbeat=0.1)
    other.take()
    on_another_machine(tmp_path / NAME)
    token = json.loads((tmp_path / NAME).read_text())["token"]
    with pytest.raises(DirectoryInUse, match="on far"):
        RunLock(tmp_path, heartbeat=0.4, stale=30).take()

    other._over.set()  # dies, and not in the middle of a last refresh
    other._thread.join()
    started = time.monotonic()
    lock = RunLock(tmp_path, heartbeat=0.2, stale=1.0)
    lock.take()
    assert 0.5 < time.monotonic() - started < 60
    assert json.loads((tmp_path / NAME).read_text())["token"] != token

    # It stood still, no more: it may not write any longer, nor take the other's file away.
    with pytest.raises(DirectoryInUse, match=str(os.getpid())):
        other.check()
    other.release()
    lock.check()
    lock.release()


def test_the_machines_clocks_do_not_matter(tmp_path, monkeypatch):
    RunLock(tmp_path)._create()
    on_another_machine(tmp_path / NAME)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    os.utime(tmp_path / NAME, (1, 1))  # long ago, by the file system
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_file_cut_short_is_judged_by_its_age(tmp_path):
    (tmp_path / NAME).write_text('{"tok')
    os.utime(tmp_path / NAME, (1, 1))
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def race(directory, start, results):
    lock = RunLock(directory)
    start.wait()
    try:
        lock.take()
    except DirectoryInUse:
        results.put(False)
    else:
        results.put(True)
        time.sleep(0.5)  # lives while the others ask


def test_exactly_one_of_many_that_find_a_dead_holder_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        (tmp_path / NAME).write_text(json.dumps({"machine": ["x"], "host": "x", "pid": 1}))
        os.utime(tmp_path / NAME, (1, 1))
        start, results = context.Event(), context.Queue()
        racers = [context.Process(target=race, args=(tmp_path, start, results)) for _ in range(6)]
        for racer in racers:
            racer.start()
        start.set()
        won = [results.get(timeout=20) for _ in racers]
        for racer in racers:
            racer.join()
        assert sum(won) == 1


def test_without_hard_links_and_without_locks_it_is_taken_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    lock = RunLock(tmp_path)
    lock.take()
    with pytest.raises(DirectoryInUse):
        RunLock(tmp_path).take()
    lock.release()


ALONE = World(0, 1, torch.device("cpu"), "gloo")


def config(checkpoints: Path, log: Path, *more: str):
    places = (f"checkpoint.checkpoint_dir={checkpoints}", f"tensorboard.log_dir={log}")
    return load(ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml", [*places, *more])


@pytest.mark.parametrize(
    "more", [(), ("checkpoint.enabled=false",)], ids=["saves", "saves nothing"]
)
def test_a_run_does_not_log_where_another_one_does(tmp_path, holder, more):
    """The second one would set the first one's log aside, and its later records would be lost."""
    own = tmp_path / "checkpoints"
    with (
        pytest.raises(ConfigError, match=rf"tensorboard\.log_dir: .*kill {holder.pid}"),
        lock_directories(config(own, tmp_path, *more), ALONE),
    ):
        pass
    assert not (own / NAME).exists()


def test_a_run_may_log_into_its_own_checkpoint_directory(tmp_path):
    with lock_directories(config(tmp_path / "a", tmp_path / "a"), ALONE) as lock:
        assert lock is not None and lock.path == tmp_path / "a" / NAME and lock.path.exists()
    assert not (tmp_path / "a" / NAME).exists()
    with lock_directories(config(tmp_path / "a", tmp_path / "b"), ALONE):
        assert (tmp_path / "a" / NAME).exists() and (tmp_path / "b" / NAME).exists()
    assert not (tmp_path / "a" / NAME).exists() and not (tmp_path / "b" / NAME).exists()


@pytest.mark.parametrize("more", [(), ("checkpoint.enabled=false",)], ids=["saves", "not"])
def test_a_run_that_goes_on_and_then_fails_is_no_longer_one_that_a_signal_stopped(tmp_path, more):
    """A sweep asks for the marker: the old one would end it at this run, each time."""
    cfg = config(tmp_path / "a", tmp_path / "b", *more)
    marker = marker_of(cfg)
    marker.parent.mkdir()
    marker.write_text("preempted at step 3\n")
    looks = config(tmp_path / "a", tmp_path / "b", *more, "step_scheduler.max_steps=0")
    with lock_directories(looks, ALONE):
        pass
    other = RunLock(marker.parent)
    other.take()
    with pytest.raises(ConfigError), lock_directories(cfg, ALONE):
        pass
    other.release()
    assert marker.exists()  # neither has gone on with it
    with pytest.raises(OSError, match="model"), lock_directories(cfg, ALONE):
        raise OSError("the model cannot be loaded")
    assert not marker.exists()
