"""A key that is right and changes nothing is told of, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from tests.scripts import script

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
NO_VALIDATION = "validation_dataset=null"
SQUAD = "dataset={_target_: ds_kd.data.squad.make_squad_dataset, %s}"


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        ([SQUAD % "seq_length: 64"], "dataset.seq_length", "add truncation: true"),
        (
            [NO_VALIDATION],
            "step_scheduler.val_every_steps",
            "no validation_dataset or validation_share",
        ),
        (
            [NO_VALIDATION, "step_scheduler.val_at_start=true"],
            "step_scheduler.val_at_start",
            "no v",
        ),
        (
            [NO_VALIDATION, "step_scheduler.val_samples=3"],
            "step_scheduler.val_samples",
            "no validation_dataset or validation_share",
        ),
        ([NO_VALIDATION], "validation_dataloader", "no validation_dataset or validation_share"),
        (["checkpoint.keep_best=2"], "checkpoint.keep_best", "without checkpoint.keep_last"),
        (
            ["step_scheduler.val_every_steps=null", "step_scheduler.patience=2"],
            "step_scheduler.patience",
            "validates after its last step only",
        ),
        (
            [NO_VALIDATION, "checkpoint={keep_last: 2, keep_best: 2}"],
            "checkpoint.keep_best",
            "no validation_dataset or validation_share",
        ),
        (
            ["distributed.cp_size=2", "teacher.window=4"],
            "teacher.window",
            "ranks that share samples take one micro-batch at a time",
        ),
        (
            ["distributed.tp_size=2", "deepspeed.reduce_once=true"],
            "deepspeed.reduce_once",
            "gradients of cut matrices are exchanged in each pass",
        ),
        (["checkpoint.enabled=false"], "step_scheduler.ckpt_every_steps", "checkpoints are off"),
        (["checkpoint=null"], "step_scheduler.ckpt_every_steps", "checkpoints are off"),
        (
            ["checkpoint={enabled: false, save_consolidated: every}"],
            "checkpoint.save_consolidated",
            "checkpoints are off",
        ),
        (
            ["compile={enabled: false, mode: max-autotune}"],
            "compile.mode",
            "compile.enabled is false",
        ),
        (["slurm={container_mounts: ['/a:/a']}"], "slurm.container_mounts", "container_image"),
        (["kd_ratio=0", NO_VALIDATION], "teacher_model", "kd_ratio is 0"),
        (
            ["kd_ratio=0", "teacher_model=null", "offload_teacher_model=true"],
            "offload_teacher_model",
            "no teacher_model",
        ),
        (
            ["packed_sequence.packed_sequence_size=64", "dataloader.group_by_length=true"],
            "dataloader.group_by_length",
            "samples are packed",
        ),
        (["dataloader.multiprocessing_context=fork"], "dataloader.multiprocessing_context", "is 0"),
    ],
)
def test_a_key_without_effect_is_noted_by_name_and_reason(overrides, key, reason):
    given = ["step_scheduler.ckpt_every_steps=5", "step_scheduler.val_every_steps=5"]
    notes = [note for note in load(GUIDE, [*given, *overrides]).notes if note.startswith(f"{key}:")]
    assert len(notes) == 1 and "no effect" in notes[0] and reason in notes[0]


def test_a_config_all_of_whose_keys_count_has_no_such_note():
    cfg = load(GUIDE, [SQUAD % "seq_length: 64, truncation: true"])
    assert not [note for note in cfg.notes if "no effect" in note]


def test_the_best_checkpoints_count_where_those_by_time_do_not_all_stay():
    """Without `ckpt_every_steps` two of the newest stay, as the run and the note decide alike."""
    by_time = ["step_scheduler.ckpt_every_steps=null", "checkpoint.keep_best=3"]
    cfg = load(GUIDE, by_time)
    assert cfg.keep_last == 2 and not [note for note in cfg.notes if "keep_best" in note]
    assert load(GUIDE, ["step_scheduler.ckpt_every_steps=5"]).keep_last is None
    assert load(GUIDE, [*by_time, "checkpoint.keep_last=7"]).keep_last == 7


OUTSIDE = "from torch.nn import Module\nclass TotalVariation: ...\nif True:\n    make = Module\n"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("far_losses.TotalVariation", "there is no module far_losses; is PYTHONPATH set?"),
        ("near_losses.TotalVariatoin", "has no TotalVariatoin; did you mean TotalVariation?"),
        ("broken_losses.TotalVariation", "broken_losses.py, line 2: "),
        ("near_parts.losses.Own", "has no losses; is PYTHONPATH set?"),
        ("near_parts.ow.f", "has no ow; is PYTHONPATH set?"),
        ("near_losses.TotalVariation", ""),
        ("near_losses.make", ""),
        ("near_losses.Module", ""),
        ("near_parts.own.f", ""),
        ("math.sqrt", ""),
    ],
)
def test_code_from_outside_that_is_not_found_is_noted(target, said, tmp_path, monkeypatch):
    (tmp_path / "near_losses.py").write_text(OUTSIDE)
    (tmp_path / "broken_losses.py").write_text("raise RuntimeError\nclass TotalVariation(:\n")
    (tmp_path / "near_parts").mkdir()
    (tmp_path / "near_parts" / "own.py").write_text("def f(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    allow = (target.partition(".")[0],)
    told = [
        n for n in load(GUIDE, [f"kd_loss_fn={{_target_: {target}}}"], allow).notes if target in n
    ]
    assert len(told) == bool(said) and said in "".join(told)
    assert not told or told[0].startswith(f"kd_loss_fn._target_: {target} is not found here: ")
    sets = f"validation_dataset={{one: {{_target_: {target}}}}}"
    told = [n for n in load(GUIDE, [sets], allow).notes if target in n]
    assert len(told) == bool(said)


def test_checking_prints_the_notes_and_finds_nothing_wrong(capsys):
    words = ["--config", str(GUIDE), "--check", SQUAD % "seq_length: 64"]
    assert script("kd").main(words) == 0
    out = capsys.readouterr().out
    assert "dataset.seq_length: has no effect" in out and "nothing wrong with it" in out


def test_a_loss_whose_name_is_no_name_is_refused_without_a_traceback():
    with pytest.raises(ConfigError, match=r"loss_fn\._target_: got \['a'\]"):
        load(GUIDE, ["loss_fn={_target_: [a]}"])


def test_the_check_notes_what_this_machine_lacks_and_the_run_refuses_missing_packages(monkeypatch):
    from ds_kd.config.checks import machine

    attention = "teacher_model.attn_implementation=flash_attention_2"
    cfg = load(GUIDE, ["wandb={project: kd}", attention])  # what it finds is remembered
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes = "\n".join(machine.notes_on_machine(cfg))
    assert "wandb: the package is not installed here; pip install wandb" in notes
    assert "flash_attention_2 needs the package" in notes
    with pytest.raises(ConfigError, match=r"teacher_model\.attn_implementation: flash_attention_2"):
        machine.refuse_missing_packages(cfg)


def test_a_timeout_in_which_a_save_may_not_end_is_told():
    """The guide's YAML has one minute."""
    told = lambda *more: [n for n in load(GUIDE, [*more]).notes if "timeout_minutes" in n]  # noqa: E731
    (note,) = told()
    assert note.startswith("dist_env.timeout_minutes: 1 is short") and "10 is the default" in note
    assert not told("dist_env.timeout_minutes=10") and not told("checkpoint.enabled=false")
