"""A run ends by naming what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_kd.config.load import load
from ds_kd.recipe.build import closing_message

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"


@pytest.mark.parametrize(
    ("consolidated", "is_there", "words"),
    [
        ("true", True, "student: {}/final "),
        ("true", False, "launch/export.py {}/LATEST OUT"),
        ("false", True, "launch/export.py {}/LATEST OUT"),  # of an earlier step
    ],
)
def test_final_is_named_only_where_it_is_there(tmp_path, consolidated, is_there, words):
    if is_there:
        (tmp_path / "final").mkdir()
    overrides = [f"checkpoint.checkpoint_dir={tmp_path}"]
    cfg = load(GUIDE, [*overrides, f"checkpoint.save_consolidated={consolidated}"])
    assert words.format(tmp_path) in closing_message(cfg, 4, finished=True)
