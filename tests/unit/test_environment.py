"""The surroundings of the process: variables, limits, directories, output. Each ends in a
sentence."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_kd import hub
from ds_kd.data.rows.source import load_rows
from ds_kd.errors import MachineError, explain
from ds_kd.parallel.rendezvous import fill_environment, job_of, name_meeting_place
from ds_kd.process import check_caches, choose_accelerator
from ds_kd.script import run_script
from tests.scripts import heed_signals

ROOT = Path(__file__).parents[2]
GUIDE = "ds_configs/runs/llama3_2_1b_kd.yaml"
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
SLURM |= {"SLURM_JOB_ID": "7", "MASTER_ADDR": "n1"}


def test_a_whole_description_of_a_job_is_taken():
    assert job_of(RANKS) == {**RANKS, "LOCAL_RANK": "0"}
    assert job_of(SLURM)["MASTER_PORT"] == "20007" and job_of(SLURM)["RANK"] == "1"
    assert job_of({"SLURM_NTASKS": "4"})["WORLD_SIZE"] == "1"  # in a shell of salloc


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "RANK is set without WORLD_SIZE, MASTER_ADDR and MASTER_PORT"),
        ({**RANKS, "RANK": "x"}, "RANK: got 'x', expected a whole number from 0 to 1"),
        ({**RANKS, "RANK": "2"}, "RANK: got '2'"),
        ({**RANKS, "RANK": "²"}, "RANK: got"),
        ({**RANKS, "WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({**RANKS, "WORLD_SIZE": ""}, "WORLD_SIZE: got ''"),
        ({**RANKS, "LOCAL_RANK": "a"}, "LOCAL_RANK: got 'a'"),
        ({**RANKS, "MASTER_PORT": "99999"}, "MASTER_PORT: got '99999', .* from 1 to 65535"),
        ({**RANKS, "LOCAL_WORLD_SIZE": "a"}, "LOCAL_WORLD_SIZE: got 'a'"),
        ({**RANKS, "CROSS_SIZE": "a"}, "CROSS_SIZE: got 'a'"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE is 3, and RANK is not set"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS: got 'x'"),
        ({**SLURM, "SLURM_PROCID": "2"}, "SLURM_PROCID: got '2'"),
        ({**SLURM, "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID: got 'a'"),
        ({**SLURM, "SLURM_LOCALID": "a"}, "SLURM_LOCALID: got 'a'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "without SLURM_JOB_NODELIST and SLURM_JOB_ID"),
    ],
)
def test_a_variable_that_is_missing_or_no_number_is_named_with_what_to_do(env, words):
    with pytest.raises(MachineError, match=words) as caught:
        job_of(env)
    assert "deepspeed, torchrun and srun set" in str(caught.value)


def test_a_rank_that_finds_nobody_names_the_place(monkeypatch):
    import torch.distributed as dist

    for name, value in {**RANKS, "GLOO_SOCKET_IFNAME": "eth7"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(MachineError, match=r"2 .* cannot meet at node1:29500, .*=eth7: refused"),
        name_meeting_place(),
    ):
        raise dist.DistNetworkError("refused")


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("MASTER_ADDR", "nowhere.invalid", "expected a name or address that this machine finds"),
        ("GLOO_SOCKET_IFNAME", "nope0", r"expected an interface of this machine \(lo"),
    ],
)
def test_a_network_that_is_not_there_is_told_before_anybody_waits(name, given, words, monkeypatch):
    for variable, value in {**RANKS, "MASTER_ADDR": "127.0.0.1", name: given}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(MachineError, match=f"{name}: got '{given}', {words}"):
        fill_environment()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "no more memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "local_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "local_batch_size"),
        (ImportError("libx.so: failed to map segment from shared object"), "ulimit -v"),
        (OSError(24, os.strerror(24)), r"ulimit -n"),
        (OSError(28, os.strerror(28), "/a/file"), r"no more room on a disk: .*/a/file"),
        (RuntimeError("can't start new thread"), r"ulimit -u"),
    ],
)
def test_a_resource_that_is_used_up_is_told_without_a_traceback(error, words, capsys):
    def work():
        raise error

    assert run_script(work) == 1
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("local_rank", "beginning"), [("1", "1 problem in the config"), ("0", "rank 1: 1 problem")]
)
def test_a_config_error_names_a_rank_only_where_another_machine_may_differ(local_rank, beginning):
    command = [sys.executable, "launch/kd.py", "-c", GUIDE, "kd_ratio=2"]
    env = {**os.environ, **RANKS, "LOCAL_RANK": local_rank}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.strip().startswith(beginning)


def test_every_other_error_keeps_its_traceback(capsys):
    assert explain(RuntimeError("shape mismatch")) is None
    assert run_script(lambda: (_ for _ in ()).throw(RuntimeError("shape"))) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "RuntimeError: shape" in told


@pytest.mark.parametrize("name", ["HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_told_as_such(name, monkeypatch, tmp_path):
    for other in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(tmp_path / "not" / "there" / "yet"))
    check_caches()
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file"))
    with pytest.raises(MachineError, match=f"{tmp_path}/file.*cannot be written.*set HF_HOME"):
        check_caches()


def test_a_hub_that_cannot_be_reached_is_asked_once_and_earlier_downloads_are_taken(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(hub, "_PAUSE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.is_reachable.cache_clear()
        hub.expect_hub("somebody/model")
        assert not huggingface_hub.constants.is_offline_mode()
    hub.expect_hub("somebody/model")  # asked once: the answer stays
    assert not huggingface_hub.constants.is_offline_mode()

    hub.is_reachable.cache_clear()  # nobody listens there any more
    try:
        hub.expect_hub(str(ROOT))  # a directory
        assert not huggingface_hub.constants.is_offline_mode()
        hub.expect_hub("somebody/model")
        assert huggingface_hub.constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
        with pytest.raises(ValueError, match=r"'somebody/rows'.*the hub does not give it"):
            load_rows("somebody/rows", "train", ())
        monkeypatch.setenv("NO_PROXY", "localhost")  # names no proxy
        for endpoint in ("https://mirror:80a", "mirror.example"):
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            hub.is_reachable.cache_clear()
            assert not hub.is_reachable()
        monkeypatch.setenv("HTTPS_PROXY", "http://nowhere:1")
        hub.is_reachable.cache_clear()
        assert hub.is_reachable()  # left to the libraries
    finally:
        hub.is_reachable.cache_clear()


def test_cuda_asked_for_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ds_kd.process._NVIDIA", tmp_path / "nvidiactl")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(MachineError, match="torch finds no GPU"):
        choose_accelerator()
    monkeypatch.delenv("DS_ACCELERATOR")
    choose_accelerator()
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch):
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ds_kd.process._NVIDIA", device)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for cuda, words in ((None, "without CUDA: bash launch/setup.sh"), ("13.0", "--gpus-per-node")):
        monkeypatch.setattr("torch.version.cuda", cuda)
        with pytest.raises(MachineError, match=words):
            choose_accelerator()
        assert "DS_ACCELERATOR" not in os.environ
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")):
        with monkeypatch.context() as wish:
            wish.setenv(name, value)
            choose_accelerator()
        os.environ.pop("DS_ACCELERATOR", None)


def test_setup_replaces_a_torch_without_cuda_where_a_gpu_is(tmp_path):
    venv, tools, asked = tmp_path / "venv", tmp_path / "tools", tmp_path / "asked"
    torch = venv / "lib" / "python3.11" / "site-packages" / "torch"
    for directory in (venv / "bin", tools, torch):
        directory.mkdir(parents=True)
    (torch / "version.py").write_text("cuda: Optional[str] = None\n")
    report = '{"install": [{"metadata": {"name": "nvidia-cublas"}}]}'
    python = venv / "bin" / "python"
    python.write_text(f"""#!/usr/bin/env bash
if [ "$1" != -m ]; then exec {sys.executable} "$@"; fi
echo "$*" >> {asked}
case $* in *--dry-run*) echo '{report}' ;; esac
""")
    python.chmod(0o755)
    stamp = subprocess.check_output(["cksum"], stdin=(ROOT / "requirements.txt").open())
    (venv / ".ds_kd-requirements.txt").write_bytes(stamp)

    def set_up():
        words = ["bash", str(ROOT / "launch" / "setup.sh"), str(venv)]
        env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout

    seen = tools / "nvidia-smi"
    seen.write_text("#!/usr/bin/env bash\nexit 1\n")  # no GPU, or no driver
    seen.chmod(0o755)
    assert "is up to date" in set_up() and not asked.exists()
    seen.write_text("#!/usr/bin/env bash\n")
    assert "makes room for the one with CUDA" in set_up()
    calls = asked.read_text().splitlines()
    assert any("uninstall --quiet --yes torch" in call for call in calls)
    assert calls[-1].endswith("-r requirements.txt")
    (torch / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert "is up to date" in set_up()


def shell(script, **variables):
    """A line of bash in which KD is the command, from a directory where nothing else lies."""
    kd = f"{sys.executable} {ROOT / 'launch' / 'kd.py'}"
    return subprocess.run(
        ["bash", "-c", script.replace("KD", kd).replace("GUIDE", str(ROOT / GUIDE))],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("ulimit -n 32; KD -c GUIDE", "ulimit -n: got 32"),
        ("ulimit -v 1000000; KD -c GUIDE", "ulimit -v: got 1000000"),
        ("DS_ACCELERATOR=banana KD -c GUIDE", "DS_ACCELERATOR: got 'banana'"),
        ("PYTHONOPTIMIZE=2 KD -c GUIDE", "python -OO takes away"),
        ("d=$(mktemp -d); cd $d; rmdir $d; KD -c GUIDE", "the working directory is gone"),
    ],
)
def test_an_environment_that_no_run_could_work_in_is_refused(script, words):
    done = shell(script)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 4


@pytest.mark.parametrize(
    ("variables", "words", "told"),
    [
        ("", "", "usage: bash launch/single_node.sh CONFIG"),
        ("", "nothing.yaml", "no file nothing.yaml"),
        ("NPROC=two", GUIDE, "NPROC: got 'two', expected a number of ranks"),
        ("NPROC=0", GUIDE, "NPROC: got '0'"),
        ("PATH=/usr/bin:/bin VENV=/nowhere", GUIDE, "no deepspeed in /nowhere or on the PATH"),
    ],
)
def test_the_launcher_of_a_node_says_what_it_lacks(variables, words, told):
    done = shell(f"cd {ROOT}; {variables} DRY_RUN=1 bash launch/single_node.sh {words}")
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_node_that_is_told_to_stop_before_its_ranks_are_there_ends_with_that_code(
    tmp_path, name, code
):
    (tmp_path / "deepspeed").write_text("#!/bin/sh\ntouch $0.started; exec sleep 60")
    (tmp_path / "deepspeed").chmod(0o755)
    script = subprocess.Popen(
        ["bash", "launch/single_node.sh", GUIDE], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_signals,
        env={**os.environ, "VENV": "/no", "NPROC": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    while not (tmp_path / "deepspeed.started").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # it listens from the line after
    script.send_signal(getattr(signal, name))
    assert script.communicate(timeout=30)[1] == "" and script.returncode == code


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_every_terminal_shows_what_it_can(locale):
    done = shell(
        "KD --list-keys kd_ratio && KD --help | tail -n 1 && KD -c GUIDE --check", **locale
    )
    assert done.returncode == 0 and not done.stderr
    assert "\\u03b1 of the distillation loss" in done.stdout


@pytest.mark.parametrize("output", ["| head -n 1", ">&-", ">&- 2>&- <&-", "> /dev/full"])
def test_output_that_nobody_takes_is_no_error(output):
    done = shell(f"KD --list-keys {output}; echo ${{PIPESTATUS[0]}} >&2" if "2>" not in output
                 else f"(KD --list-keys {output}); echo $? >&2")  # fmt: skip
    assert done.stderr == "0\n"


def test_a_file_that_is_opened_first_does_not_become_standard_output(tmp_path):
    """The number of a closed descriptor is the next file's."""
    script = "from ds_kd.process import prepare; prepare(); import os; f = open('kept', 'w'); "
    script += "print('text', flush=True); os.write(1, b'text'); f.write('mine')"
    kept = tmp_path / "kept"
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "_", sys.executable, "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and kept.read_text() == "mine"


LOADER = """
import os, signal, sys, time
from torchdata.stateful_dataloader import StatefulDataLoader
from ds_kd.parallel.signals import end_workers_at_exit, prepare_worker
from ds_kd.script import run_script

class Rows(list):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else time.sleep(3600)

end_workers_at_exit()
workers = dict(num_workers=2, timeout=5, worker_init_fn=prepare_worker)
batches = iter(StatefulDataLoader(Rows([0]), **workers))
sys.exit(run_script(lambda: next(batches)))
"""


@pytest.mark.parametrize(
    ("how", "told"), [("killed", "is killed by signal|exited unexpectedly"), ("stuck", "timed out")]
)
def test_a_loader_worker_that_gives_no_batch_ends_the_run_with_a_message(how, told):
    done = subprocess.run(
        [sys.executable, "-c", LOADER, how], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert re.search(told, done.stderr) and "dataloader.num_workers" in done.stderr
    # Torch logs one, behind its prefix, where the signal arrives while it imports its profiler.
    assert not re.search("^Traceback", done.stderr, re.MULTILINE)


BATCHES = """
import socket
from multiprocessing import resource_sharer
from ds_kd.parallel.signals import prepare_worker

{prepare}
for _ in range(2):  # the second is served after the first connection broke
    batch = resource_sharer.DupFd(1)
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(batch._id[0])
        rank.recv(1)  # what is left unread makes closing a reset, as a kill does
    batch.detach()
"""


@pytest.mark.parametrize(("prepare", "is_told"), [("prepare_worker(0)", False), ("", True)])
def test_a_rank_that_is_killed_while_it_fetches_a_batch_leaves_no_traceback(prepare, is_told):
    done = subprocess.run(
        [sys.executable, "-c", BATCHES.format(prepare=prepare)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("Traceback" in done.stderr) == is_told
