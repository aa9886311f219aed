"""What the README says about keys comes from the code."""

from __future__ import annotations

from pathlib import Path

from ds_kd.config.reference.keys import key_table

ROOT = Path(__file__).parents[2]


def test_the_readmes_table_is_the_schemas():
    assert key_table() in (ROOT / "README.md").read_text(), (
        "run python -m ds_kd.config.reference.keys and paste its output"
    )


def test_every_script_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for name in (
        "quickstart.sh",
        "test.sh",
        "kd.py",
        "prune.py",
        "export.py",
        "single_node.sh",
        "slurm.sh",
    ):
        assert f"launch/{name}" in text and (ROOT / "launch" / name).exists()
