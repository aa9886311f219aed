"""A rank that is gone, no launcher being there to end the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from ds_kd.parallel.rendezvous import free_port
from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment


def start(rank, port, overrides, log):
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "launch/kd.py", "--config", GUIDE, *overrides],
        cwd=ROOT,
        env={**environment(), **ranks, **address},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def test_rank_0s_death_is_told_by_the_others_in_one_message_and_its_lock_is_taken_over(tmp_path):
    tiny.llama(tmp_path / "student", seed=1)
    tiny.llama(tmp_path / "teacher", layers=3, hidden=64, tie=False, seed=2)
    (tmp_path / "squad.jsonl").write_text(tiny.squad_rows(22))
    overrides = [
        f"model.pretrained_model_name_or_path={tmp_path / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={tmp_path / 'teacher'}",
        f"dataset.dataset_name={tmp_path / 'squad.jsonl'}",
        f"checkpoint.checkpoint_dir={tmp_path / 'run'}",
        "validation_dataset=null",
        "step_scheduler.global_batch_size=8",
        "step_scheduler.num_epochs=99",
        "step_scheduler.ckpt_every_steps=3",
        "dist_env.timeout_minutes=0.3",
        "checkpoint.save_consolidated=true",
    ]
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    port = free_port()
    ranks = [start(rank, port, overrides, logs[rank]) for rank in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "LATEST").exists():
            assert all(rank.poll() is None for rank in ranks), logs[0].read_text()
            assert time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.05)
        ranks[0].send_signal(signal.SIGKILL)
        assert ranks[1].wait(timeout=300) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    text = logs[1].read_text()
    assert text.count("rank 0 does not answer") == 1 and "goes on" in text, text
    assert "Traceback" not in text and "frame #" not in text and len(text.splitlines()) < 5, text
    assert (tmp_path / "run" / "RUNNING").exists()

    again = subprocess.run(
        [sys.executable, "launch/kd.py", "--config", GUIDE, *overrides,
         "step_scheduler.max_steps=4"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout and not (tmp_path / "run" / "RUNNING").exists()
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
