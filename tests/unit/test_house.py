"""The rules that keep DESIGN's picture true."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ds_kd"
DEEPSPEED = {
    "engines.py",
    "models.py",
    "checkpoint.py",
    "distributed.py",
    "zero_files.py",
    "export.py",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_only_the_engines_rooms_import_deepspeed():
    guilty = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imports(path))
    }
    assert guilty <= DEEPSPEED


def test_only_the_recipe_reads_the_config():
    rooms = {"ds_kd.config", "ds_kd.schema", "ds_kd.targets"}
    readers = {path.name for path in PACKAGE.rglob("*.py") if rooms & imports(path)}
    describe = {
        "config.py",
        "schema.py",
        "slurm.py",
        "yaml_source.py",
        "preflight.py",
        "json_schema.py",
        "key_table.py",
        "contradictions.py",
        "idle_keys.py",
        "interpolation.py",
        "target_arguments.py",
        "pretrained.py",
        "target_check.py",
        "optimizer.py",
    }
    assert readers == {
        *describe,
        "__init__.py",
        "recipe.py",
        "loaders.py",
        "dry_run.py",
        "starter.py",
    }


def test_losses_schedule_and_state_stand_alone():
    for name in ("losses.py", "schedule.py", "state.py"):
        assert not any(found.startswith("ds_kd") for found in imports(PACKAGE / name)), name
