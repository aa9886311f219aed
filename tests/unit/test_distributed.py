"""Rank and address from whatever started the process."""

from __future__ import annotations

import os

import pytest

from ds_kd import distributed
from ds_kd.distributed import _fill_environment, _first_slurm_host

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
    _fill_environment()
    assert [os.environ[name] for name in NAMES] == ["5", "8", "1", "10.0.0.7", "20042"]


def test_plain_python_is_a_world_of_one(environment):
    _fill_environment()
    assert [os.environ[name] for name in NAMES[:3]] == ["0", "1", "0"]


def test_a_launchers_variables_are_left_alone(environment):
    environment.setenv("RANK", "3")
    environment.setenv("WORLD_SIZE", "4")
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "2")
    _fill_environment()
    assert os.environ["RANK"] == "3" and os.environ["WORLD_SIZE"] == "4"


def test_a_build_lock_goes_when_its_owner_is_dead_and_only_then(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("dead", "alive"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
    dead, alive = (tmp_path / "py311_cpu" / name / "lock" for name in ("dead", "alive"))
    dead.touch()
    with alive.open("w"):  # as torch's FileBaton holds it
        assert distributed.clear_stale_locks() == [dead]
        assert alive.exists() and not dead.exists()
        monkeypatch.setenv("SLURM_NNODES", "2")  # its owner may be on another node
        dead.touch()
        assert distributed.clear_stale_locks() == [] and dead.exists()
