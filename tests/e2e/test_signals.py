"""A run that is told to stop, and one that is killed: the same command goes on, bitwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ds_kd.parallel.rendezvous import free_port
from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment, kd_command
from tests.scripts import heed_signals

STEPS = 12


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    root = tmp_path_factory.mktemp("signals")
    tiny.llama(root / "student", seed=1)
    tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)
    (root / "squad.jsonl").write_text(tiny.squad_rows(22))
    return root, [
        f"model.pretrained_model_name_or_path={root / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={root / 'teacher'}",
        f"dataset.dataset_name={root / 'squad.jsonl'}",
        "validation_dataset=null",
        "checkpoint.save_consolidated=true",
        "dataloader.shuffle=true",
        "dataloader.num_workers=2",
        "step_scheduler.global_batch_size=8",
        "step_scheduler.num_epochs=9",
        f"step_scheduler.max_steps={STEPS}",
        "step_scheduler.ckpt_every_steps=3",
        "optimizer.lr=0.01",
    ]


def start(overrides, directory, ranks):
    """The run as a process group of its own, its output line by line."""
    return subprocess.Popen(
        kd_command(*overrides, f"checkpoint.checkpoint_dir={directory}", ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def until(process, word):
    """Lines up to one that holds `word`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError("".join(lines))


def rank_processes(process):
    """The Python processes that run kd.py, loader workers left out."""
    found = []
    for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
        words = child.cmdline()
        is_rank = any(w.endswith("kd.py") for w in words) and "-m" not in words
        if is_rank and "deepspeed" not in os.path.basename(words[1] if len(words) > 1 else ""):
            found.append(child)
    inner = {c.pid for p in found for c in p.children(True)}
    return [p for p in found if p.pid not in inner]


def finish(process, seconds=300):
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # nothing goes on beside the tests that follow
        raise
    return process.returncode, output


def final_weights(directory):
    return load_file(directory / "final" / "model.safetensors")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def undisturbed(request, common):
    root, overrides = common
    directory = root / f"undisturbed{request.param}"
    code, output = finish(start(overrides, directory, request.param))
    assert code == 0, output
    return request.param, final_weights(directory)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_then_killed_it_ends_as_if_nothing_had_happened(common, undisturbed):
    """SIGUSR1 at one rank, later SIGKILL of everything, and the same command each time."""
    root, overrides = common
    ranks, expected = undisturbed
    directory = root / f"disturbed{ranks}"

    process = start(overrides, directory, ranks)
    until(process, f"step  2/{STEPS}")
    rank_processes(process)[-1].send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 0 and "Traceback" not in output, output
    assert "preempted at step" in output
    stopped_at = int((directory / "LATEST").resolve().name[-7:])
    assert stopped_at < STEPS
    marker = directory / "PREEMPTED"
    assert marker.read_text() == f"preempted at step {stopped_at}\n"

    process = start(overrides, directory, ranks)
    lines = until(process, f"step {stopped_at + 4:>2}/{STEPS}")
    assert any(f"at step {stopped_at}" in line for line in lines)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)

    code, output = finish(start(overrides, directory, ranks))
    assert code == 0, output
    assert "resumed from" in output and not marker.exists()
    assert same(final_weights(directory), expected)
    log = (directory / "tensorboard" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_rank_that_is_gone_is_named_with_the_step_and_the_last_checkpoint(common, number):
    root, overrides = common
    directory = root / f"gone{number}"
    process = start([*overrides, "dist_env.timeout_minutes=0.1"], directory, 2)
    lines = until(process, f"step  5/{STEPS}")
    victim = next(p for p in rank_processes(process) if p.environ()["RANK"] == "1")
    started = time.monotonic()
    victim.send_signal(number)
    code, output = finish(process)
    text = "".join(lines) + output
    assert code != 0, text
    assert time.monotonic() - started < 180
    if "rank 1 does not answer in step" not in text:  # the launcher was quicker than rank 0
        assert number == signal.SIGKILL, text
    else:
        assert "the last checkpoint is" in text and "step_0000003" in text
    assert "Traceback" not in text, text


def launched(launcher, config):
    """The command of two ranks, of one for plain Python."""
    if launcher == "single_node.sh":
        return ["bash", "launch/single_node.sh", GUIDE, *config]
    start = {
        "python": [sys.executable],
        "deepspeed": ["deepspeed", "--master_port", str(free_port()), "--num_accelerators", "2"],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())],
    }
    return [*start[launcher], "launch/kd.py", "--config", GUIDE, *config]


@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun", "single_node.sh"])
def test_ctrl_c_ends_the_step_saves_and_ends_without_a_traceback(common, launcher):
    """A terminal sends SIGINT to launcher, ranks and loader workers at the same time."""
    root, overrides = common
    directory = root / f"ctrl_c_{launcher}"
    long = ["step_scheduler.max_steps=2000", "step_scheduler.num_epochs=999"]
    long += ["step_scheduler.ckpt_every_steps=2000", f"checkpoint.checkpoint_dir={directory}"]
    process = subprocess.Popen(
        launched(launcher, [*overrides, *long]),
        cwd=ROOT,
        env={**environment(), "NPROC": "2", "VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    until(process, "step    2/2000")
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)  # to the end of the ranks, which hold the pipe
    assert (directory / "LATEST").exists(), output
    stopped_at = int((directory / "LATEST").resolve().name[-7:])
    assert 2 <= stopped_at < 2000
    assert (directory / "PREEMPTED").read_text() == f"preempted at step {stopped_at}\n"
    assert f"preempted at step {stopped_at}; the same command goes on" in output
    assert 'kd.py", line' not in output, output  # launchers have tracebacks of their own
    if launcher in ("python", "single_node.sh"):
        assert code == 0 and "Traceback" not in output, output


STOP = """
import os, signal, time
from ds_kd.parallel.signals import StopRequest
stop = StopRequest()
stop.listen()
looked_at = stop()
def send(name):
    os.kill(os.getpid(), getattr(signal, name))
"""


def stopped(script, **variables):
    made = {n: v for n, v in os.environ.items() if n not in ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")}
    return subprocess.run(
        [sys.executable, "-c", STOP + script],
        cwd=ROOT, env={**made, **variables}, capture_output=True, text=True, timeout=60,
        preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_second_signal_ends_the_process_at_once(name):
    done = stopped(f"send('{name}'); print(stop(), flush=True); send('{name}'); time.sleep(9)")
    assert done.stdout == "True\n" and not done.stderr
    assert done.returncode == 128 + getattr(signal, name)


def test_under_nohup_the_end_of_the_terminal_is_no_request():
    again = "signal.signal(signal.SIGHUP, signal.SIG_IGN); stop = StopRequest(); stop.listen(); "
    done = stopped(again + "stop(); send('SIGHUP'); print(stop())")
    assert done.stdout == "False\n" and done.returncode == 0


@pytest.mark.parametrize("launcher", ["CROSS_SIZE", "TORCHELASTIC_RUN_ID"])
def test_a_signal_that_a_launcher_passes_on_is_no_second_one(launcher):
    echo = "send('SIGINT'); send('SIGINT'); send('SIGTERM'); print(stop(), flush=True); "
    done = stopped(echo + "time.sleep(3.5); send('SIGINT'); time.sleep(9)", **{launcher: "1"})
    assert done.stdout == "True\n" and done.returncode == 130


def test_ctrl_c_while_models_load_ends_the_process_at_once():
    done = stopped("stop = StopRequest(); stop.listen(); send('SIGINT'); time.sleep(9)")
    assert done.returncode == 130 and not done.stderr
