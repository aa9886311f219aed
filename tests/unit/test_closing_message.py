"""A run ends by naming what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_kd.config.load import load
from ds_kd.recipe.results import closing_message

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


def test_the_best_validation_and_what_to_do_next_are_told(tmp_path):
    overrides = [f"checkpoint.checkpoint_dir={tmp_path}", "checkpoint.save_consolidated=true"]
    cfg = load(GUIDE, overrides)
    (tmp_path / "final").mkdir()
    assert "best validation" not in closing_message(cfg, 4, finished=True)  # there is no log
    log = tmp_path / "tensorboard" / "metrics.jsonl"
    log.parent.mkdir()
    losses = {0: 3.0, 2: 1.25, 4: float("nan"), 6: 0.5}  # step 6 is of a later run
    log.write_text(
        "".join(json.dumps({"step": s, "val_loss": v}) + "\n" for s, v in losses.items())
    )
    told = closing_message(cfg, 4, finished=True).splitlines()
    assert told[0] == "best validation: loss 1.2500 after step 2, 3.0000 before the first"
    assert f'try it: python launch/generate.py --model {tmp_path}/final --prompt "…"' in told
    assert told[-1] == f"curves: tensorboard --logdir {tmp_path}/tensorboard"
    (tmp_path / "final" / "chat_template.jinja").write_text("")
    assert f"generate.py --model {tmp_path}/final --chat" in closing_message(cfg, 4, finished=True)
