"""Rank and address from whatever started the process."""

from __future__ import annotations

import os

import pytest
import torch

from ds_kd.parallel import rendezvous, world
from ds_kd.parallel.rendezvous import _first_slurm_host, fill_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in NAMES:
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("node7", "node7"),
        ("a1,a2", "a1"),
        ("rack-2-n[1,4]", "rack-2-n1"),
    ],
)
def test_the_first_host_of_a_slurm_list_is_the_master(nodelist, first):
    assert _first_slurm_host(nodelist) == first


def test_srun_variables_become_ranks(environment):
    # A name that resolves nowhere, so that srun's own address takes its place.
    given = {
        "LAUNCH_NODE_IPADDR": "10.0.0.7",
        "PROCID": "5",
        "NTASKS": "8",
        "LOCALID": "1",
        "JOB_NODELIST": "nowhere-invalid[2-3]",
        "JOB_ID": "42",
    }
    for name, value in given.items():
        environment.setenv(f"SLURM_{name}", value)
    fill_environment()
    assert [os.environ[name] for name in NAMES] == ["5", "8", "1", "10.0.0.7", "20042"]


def test_plain_python_is_a_world_of_one(environment):
    fill_environment()
    assert [os.environ[name] for name in NAMES[:3]] == ["0", "1", "0"]


@pytest.mark.parametrize(("local", "visible", "number"), [(3, 1, 0), (3, 4, 3), (5, 4, 1)])
def test_deepspeed_reads_the_number_of_the_gpu_that_a_rank_sees(
    environment, local, visible, number
):
    chosen = []
    environment.setenv("LOCAL_RANK", str(local))
    environment.setattr(torch.cuda, "device_count", lambda: visible)
    environment.setattr(torch.cuda, "set_device", chosen.append)
    world.choose_gpu()
    assert chosen == [number] and os.environ["LOCAL_RANK"] == str(number)


def test_a_launchers_variables_are_left_alone(environment):
    environment.setenv("RANK", "3")
    environment.setenv("WORLD_SIZE", "4")
    environment.setenv("MASTER_ADDR", "localhost")
    environment.setenv("MASTER_PORT", "29500")
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "2")
    fill_environment()
    assert os.environ["RANK"] == "3" and os.environ["WORLD_SIZE"] == "4"


def test_a_build_lock_goes_when_its_owner_is_dead_and_only_then(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("dead", "alive"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
    dead, alive = (tmp_path / "py311_cpu" / name / "lock" for name in ("dead", "alive"))
    dead.touch()
    with alive.open("w"):  # as torch's FileBaton holds it
        assert rendezvous.clear_stale_locks() == [dead]
        assert alive.exists() and not dead.exists()
        monkeypatch.setenv("SLURM_NNODES", "2")  # its owner may be on another node
        dead.touch()
        assert rendezvous.clear_stale_locks() == [] and dead.exists()


@pytest.fixture
def shared(environment, tmp_path, monkeypatch):
    """A temporary directory in which somebody else may have been before."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment.setenv("CROSS_SIZE", "1")
    environment.setenv("WORLD_SIZE", "2")
    environment.setenv("RANK", "0")
    environment.setenv("MASTER_PORT", str(rendezvous.free_port()))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    return tmp_path, victim


def test_no_link_made_beforehand_is_written_through(shared):
    directory, victim = shared
    own = directory / f"ds_kd-{os.getuid()}"
    own.mkdir(mode=0o700)
    for name in (f"port-{os.getppid()}", f"port-{os.getppid()}.new"):
        (own / name).symlink_to(victim)
    with rendezvous.free_master_port():
        port = own / f"port-{os.getppid()}"
        assert not port.is_symlink() and port.read_text() == os.environ["MASTER_PORT"]
        assert port.stat().st_mode & 0o077 == 0
        assert rendezvous._wait_for_text(port, 0) == os.environ["MASTER_PORT"]
    assert victim.read_text() == "precious" and victim.stat().st_size == 8
    assert [*own.iterdir()] == []


@pytest.mark.parametrize("trap", ["link", "open to all"])
def test_a_directory_that_others_may_have_filled_is_not_used(shared, trap):
    directory, _ = shared
    own = directory / f"ds_kd-{os.getuid()}"
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if trap == "link":
        own.symlink_to(elsewhere)
    else:
        own.mkdir()
        own.chmod(0o777)
        elsewhere = own
    before = os.environ["MASTER_PORT"]
    with rendezvous.free_master_port():
        assert [*elsewhere.iterdir()] == []
        assert os.environ["MASTER_PORT"] == before
        # Somebody speaks of an error: a file made beforehand silences nobody.
        (elsewhere / f"failed-{os.getppid()}-{before}").touch()
        assert world.is_first_to_fail()


def test_a_port_of_a_launcher_that_had_the_same_number_is_not_read(shared):
    directory, _ = shared
    path = directory / "port"
    path.write_text("1234")
    os.utime(path, (1, 1))
    assert rendezvous._wait_for_text(path, newer_than=2, seconds=0.2) is None
