"""The package as `pip install .` leaves it: a wheel, away from the repository."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.test_run import GUIDE, ROOT, environment

LISTS = """
import pkgutil, ds_kd
print(ds_kd.__file__)
print(*sorted(m.name for m in pkgutil.walk_packages(ds_kd.__path__, "ds_kd.")))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing of ours but the installed wheel, and how to run a command in it."""
    # Asking for pip's spec would switch off setuptools' own distutils in this process.
    if not {"pip", "setuptools"} <= {found.name for found in importlib.metadata.distributions()}:
        pytest.skip("building a wheel needs pip and setuptools, and one of them is not installed")
    made = tmp_path_factory.mktemp("wheel")
    source = made / "source"
    shutil.copytree(ROOT / "ds_kd", source / "ds_kd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def run(*command: str | Path) -> str:
        variables = environment() | {"PYTHONPATH": str(made / "site")}
        variables["PATH"] = f"{made / 'site' / 'bin'}{os.pathsep}{variables['PATH']}"
        done = subprocess.run(
            [str(word) for word in command], cwd=made / "away", env=variables, text=True,
            capture_output=True, timeout=480, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # The dependencies are there, and so is what builds: nothing is asked of a package index.
    (made / "away").mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", made)
    (wheel,) = made.glob("*.whl")
    run(*pip, "install", wheel, "--no-deps", "--no-index", "--target", made / "site")
    return made, run


def test_the_wheel_has_all_and_runs(installed):
    made, run = installed
    place, names = run(sys.executable, "-c", LISTS).splitlines()
    assert Path(place).is_relative_to(made / "site")
    parts = [p.relative_to(ROOT).with_suffix("").parts for p in (ROOT / "ds_kd").rglob("*.py")]
    assert {n for p in parts if (n := ".".join(p).removesuffix(".__init__")) != "ds_kd"} == {
        *names.split()
    }
    # It has no files but Python's: one that is added has to be named in pyproject.toml.
    others = [
        p for p in (ROOT / "ds_kd").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    assert not others

    # The command is that of launch/kd.py.
    tiny.llama(made / "student", seed=1)
    tiny.llama(made / "teacher", layers=3, seed=2)
    (made / "rows.jsonl").write_text(tiny.squad_rows(8))
    words = [
        *("--config", ROOT / GUIDE, "step_scheduler.max_steps=1", "validation_dataset=null"),
        f"model.pretrained_model_name_or_path={made}/student",
        f"teacher_model.pretrained_model_name_or_path={made}/teacher",
        *(f"dataset.dataset_name={made}/rows.jsonl", "step_scheduler.global_batch_size=4"),
        *(f"checkpoint.checkpoint_dir={made}/run", "checkpoint.save_consolidated=true"),
    ]
    assert "kd_ratio" in run("ds-kd", "--list-keys", "kd_ratio")
    assert "nothing wrong with it" in run(sys.executable, "-m", "ds_kd", *words, "--check")
    assert "step 1/1" in run("ds-kd", *words)
    assert "\nds-kd --config" in (made / "run" / "final" / "README.md").read_text()
