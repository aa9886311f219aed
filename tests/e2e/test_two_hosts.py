"""Several machines without SLURM: two network namespaces, each a host of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import psutil
import pytest

from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment

BRIDGE, NET = "dskd0", "10.79.13"
HOSTS = {"dskd-a": f"{NET}.11", "dskd-b": f"{NET}.12"}


def why_not() -> str | None:
    if os.getuid() != 0:
        return "network namespaces are made as root"
    absent = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install iproute2 util-linux"
    tried = subprocess.run(["ip", "netns", "add", "dskd-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "dskd-try"], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@pytest.fixture
def hosts(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def clean():
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)

    clean()
    names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    # No DNS inside: reverse look-ups would wait for one.
    (tmp_path / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\n")
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    for k, (name, address) in enumerate(HOSTS.items()):
        ip("netns", "add", name)
        ip("link", "add", f"dskdv{k}", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"dskdv{k}", "master", BRIDGE, "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")
    yield tmp_path
    clean()


def on(host, files, command):
    """Start a command on a host: its network, its name, its /etc/hosts."""
    script = (
        f"hostname {host}; for f in hosts nsswitch.conf; do mount --bind {files}/$f /etc/$f; "
        'done; exec "$@"'
    )
    enter = ["nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", "--mount"]
    return subprocess.Popen(
        [*enter, "bash", "-c", script, "_", *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_on_both(hosts, run):
    """Start a run with two ranks on each host, as docs/operations.md says."""
    command = ["deepspeed", "--hostfile", str(hosts / "hostfile"), "--no_ssh"]
    command += ["--master_addr", next(iter(HOSTS)), "--master_port", "29511"]
    return [
        on(name, hosts, [*command, "--node_rank", str(k), *run]) for k, name in enumerate(HOSTS)
    ]


def kill(process):
    """End a host's launcher and ranks at once, as a power failure would."""
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()


def test_cut_matrices_on_two_hosts_with_the_documented_command_outlive_the_loss_of_one(hosts):
    (hosts / "hostfile").write_text("".join(f"{name} slots=2\n" for name in HOSTS))
    (hosts / "rows.jsonl").write_text(tiny.squad_rows(22))
    run = ["launch/kd.py", "--config", GUIDE, "distributed.tp_size=2"]
    run += [f"model.pretrained_model_name_or_path={tiny.llama(hosts / 'student', seed=1)}"]
    run += [f"teacher_model.pretrained_model_name_or_path={tiny.llama(hosts / 'teacher', seed=2)}"]
    run += [f"dataset.dataset_name={hosts / 'rows.jsonl'}", "validation_dataset=null"]
    run += [f"checkpoint.checkpoint_dir={hosts / 'run'}", "step_scheduler.global_batch_size=8"]
    run += ["step_scheduler.max_steps=8", "step_scheduler.num_epochs=9"]
    run += ["step_scheduler.ckpt_every_steps=2"]

    first, second = start_on_both(hosts, run)
    deadline = time.monotonic() + 180
    while not (hosts / "run" / "LATEST").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    kill(second)
    output = first.communicate(timeout=180)[0]
    assert first.returncode and "step 8/8" not in output, output

    started = start_on_both(hosts, run)
    outputs = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert "4 rank(s)" in outputs[0] and "resumed from" in outputs[0] and "step 8/8" in outputs[0]
    assert (hosts / "run" / "LATEST").resolve().name == "step_0000008"
