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


@pytest.mark.parametrize(("best", "is_named"), [(2, True), (4, False), (3, False)])
def test_the_best_checkpoint_is_named_where_it_is_there_and_not_the_last(tmp_path, best, is_named):
    for step in (2, 4):
        (tmp_path / f"step_{step:07d}").mkdir()
    (tmp_path / "LATEST").symlink_to("step_0000004")
    (tmp_path / "BEST").symlink_to(f"step_{best:07d}")
    told = closing_message(load(GUIDE, [f"checkpoint.checkpoint_dir={tmp_path}"]), 4, finished=True)
    line = f"lowest validation loss: step_0000002; python launch/export.py {tmp_path}/BEST OUT"
    assert (line in told) == is_named == ("BEST" in told)
