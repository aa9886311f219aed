"""launch/slurm.sh and launch/submit.py on a real SLURM of two nodes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.e2e.test_run import ROOT, environment
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STEPS = 10


@pytest.fixture(scope="module")
def cluster():
    root = Path(tempfile.mkdtemp(prefix="slurm"))
    root.chmod(0o755)
    made = Cluster(root)
    made.environment.update(environment())
    made.environment.pop("PYTHONUNBUFFERED", None)  # submit.py's lines come in order without it
    made.environment["PATH"] = f"{Path(sys.executable).parent}:{made.environment['PATH']}:/usr/sbin"
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def submit(cluster, tmp_path_factory):
    """`submit(name, **extra)` → (job id, checkpoint directory) of a run on both nodes."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "rows.jsonl").write_text(tiny.squad_rows(22))
    config = {
        "model": {"pretrained_model_name_or_path": str(tiny.llama(root / "student", seed=1))},
        "teacher_model": {
            "pretrained_model_name_or_path": str(tiny.llama(root / "teacher", hidden=64, seed=2))
        },
        "dataset": {
            "_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(root / "rows.jsonl"),
        },
        "dataloader": {"shuffle": True},
        "step_scheduler": {"global_batch_size": 4, "num_epochs": 9, "max_steps": STEPS},
        "optimizer": {"lr": 0.01},
        "slurm": {"nodes": 2, "time": "00:20:00", "log_dir": str(root)},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))

    def submit(name, *overrides):
        directory = root / name
        command = [sys.executable, "launch/submit.py", "--config", str(root / "run.yaml")]
        command += [f"checkpoint.checkpoint_dir={directory}", f"slurm.job_name={name}", *overrides]
        done = subprocess.run(
            command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1], directory

    submit.logs = root
    return submit


def log_of(submit, name, job, attempt=1):
    log = submit.logs / f"slurm-{name}-{job}.attempt-{attempt}.log"
    return log.read_text() if log.exists() else ""


def until_step(submit, name, job, step, attempt=1):
    deadline = time.monotonic() + 120
    while f"step {step:>2}/{STEPS}" not in log_of(submit, name, job, attempt):
        assert time.monotonic() < deadline, log_of(submit, name, job, attempt)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(cluster, submit):
    job, directory = submit("undisturbed")
    assert cluster.finish(job) == "COMPLETED", log_of(submit, "undisturbed", job)
    return job, directory


def ranks_of(job, variable, value):
    """The ranks of a job in whose environment SLURM has set a variable to a value."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if any(word.endswith("kd.py") for word in process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get(variable) == value
        and (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
    ]


def losses(directory):
    """The training loss of every step of a run."""
    lines = (directory / "tensorboard" / "metrics.jsonl").read_text().splitlines()
    found = {r["step"]: r["train_loss"] for r in map(json.loads, lines) if "train_loss" in r}
    assert [*found] == [*range(1, STEPS + 1)]
    return [*found.values()]


def weights(directory):
    return load_file(directory / "final" / "model.safetensors")


def test_two_nodes_run_to_the_end(submit, undisturbed):
    log = log_of(submit, "undisturbed", undisturbed[0])
    assert "2 rank(s)" in log and f"step {STEPS}/{STEPS}" in log


def test_a_job_whose_time_is_up_saves_and_goes_on_by_itself_bitwise(cluster, submit, undisturbed):
    job, directory = submit("again")
    until_step(submit, "again", job, 3)
    # The effect of --signal=B:USR1@120 two minutes before the end.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.start_again_now(job)
    assert "preempted at step" in log_of(submit, "again", job)
    assert cluster.finish(job) == "COMPLETED", log_of(submit, "again", job, 2)
    assert "resumed from" in log_of(submit, "again", job, 2)
    expected, got = weights(undisturbed[1]), weights(directory)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_cut_matrices_on_two_nodes_outlive_the_loss_of_one_of_them(cluster, submit, undisturbed):
    cut = ("distributed.tp_size=2", "slurm.ntasks_per_node=2", "step_scheduler.ckpt_every_steps=2")
    job, directory = submit("cut", *cut)
    until_step(submit, "cut", job, 4)
    lost = ranks_of(job, "SLURM_NODEID", "1")
    assert len(lost) == 2
    cluster.lose("n2", lost)
    cluster.bring_back("n2")
    cluster.start_again_now(job)
    assert cluster.finish(job) == "COMPLETED", log_of(submit, "cut", job, 2)
    log = log_of(submit, "cut", job, 2)
    assert "4 rank(s)" in log and "resumed from" in log
    # Two ranks with whole matrices take the same samples; sums are in another order.
    assert losses(directory) == pytest.approx(losses(undisturbed[1]), rel=1e-5, abs=1e-5)


def test_a_cancelled_job_saves_and_is_not_started_again(cluster, submit):
    job, directory = submit("cancelled")
    until_step(submit, "cancelled", job, 3)
    cluster.run("scancel", job)
    assert cluster.finish(job) == "CANCELLED"
    deadline = time.monotonic() + 40
    while not (directory / "PREEMPTED").exists():
        assert time.monotonic() < deadline, log_of(submit, "cancelled", job)
        time.sleep(0.2)
    assert (directory / "LATEST").exists()


def test_a_rank_that_dies_fails_the_job(cluster, submit):
    job, _ = submit("dies")
    until_step(submit, "dies", job, 2)
    [rank] = ranks_of(job, "SLURM_PROCID", "1")
    rank.send_signal(signal.SIGKILL)
    assert cluster.finish(job) == "FAILED"
    assert cluster.about(job, "ExitCode") != "0:0"
