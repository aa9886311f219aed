"""benchmarks/studies/study.py: which runs are one setting, their means, and what is compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.studies import study
from ds_kd.errors import UserError
from ds_kd.evaluate.report.runs import Run
from ds_kd.plan.sweep import lay_out
from tests import tiny

ROOT = Path(__file__).parents[2]
USUAL = {
    "kd_ratio": 0.5,
    "kd_loss_fn.temperature": 1,
    "teacher_model.pretrained_model_name_or_path": "quickstart/teacher",
    "optimizer.lr": 5e-4,
}


def write_run(root: Path, name: str, ce: float, **settings: Any) -> None:
    """A finished run with two validations; KL is CE - 1."""
    run = root / "runs" / name
    (run / "tensorboard").mkdir(parents=True)
    (run / "LATEST").mkdir()
    (run / "FINISHED").write_text("")
    records = [
        {"step": step, "val_ce_loss": value, "val_kl_at_t1": value - 1, "eval_squad/f1": 0.5}
        for step, value in ((2, 9.0), (4, ce))
    ]
    (run / "tensorboard" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    config: dict[str, Any] = {}
    for key, value in (USUAL | settings).items():
        *parts, last = key.split(".")
        section = config
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    (run / "LATEST" / "config.yaml").write_text(yaml.safe_dump(config))


def names_of(*runs: dict[str, Any]) -> list[str]:
    return [setting.name for setting in study.name_settings([USUAL | run for run in runs])]


def test_a_name_tells_what_differs_and_what_changes_nothing_is_no_difference():
    tuned = {"teacher_model.pretrained_model_name_or_path": "study/tuned/final"}
    alone = {"kd_ratio": 0}
    assert names_of({}, tuned, alone) == [
        "KD, α 0.5, T 1",
        "KD, α 0.5, T 1, teacher tuned",
        "CE only",
    ]
    assert names_of({}, {"optimizer.lr": 1e-3}, {"optimizer.lr": 5e-4}) == [
        "KD, α 0.5, T 1", "KD, α 0.5, T 1, optimizer.lr 0.001", "KD, α 0.5, T 1"
    ]  # fmt: skip
    hot = {"kd_loss_fn.temperature": 2.0}
    assert names_of(alone, alone, alone | hot) == ["CE only", "CE only", "CE only, T 2"]
    assert names_of(alone, alone | tuned, {"kd_ratio": 1.0} | hot) == [
        "CE only", "CE only, teacher tuned", "KD, α 1, T 2"
    ]  # fmt: skip
    same = {"checkpoint.checkpoint_dir": "b", "step_scheduler.ckpt_every_steps": 7, "compile": True}
    one, other = study.name_settings([USUAL, USUAL | same | {"kd_loss_fn.temperature": 1.0}])
    assert one == other


def test_two_runs_of_one_setting_and_seed_are_refused_by_their_directories(tmp_path):
    (tmp_path / "runs" / "stopped").mkdir(parents=True)
    assert study.read_study(tmp_path) == {}
    write_run(tmp_path, "first", 2.0, **{"rng.seed": 1})
    write_run(tmp_path, "other", 3.0, **{"rng.seed": 1, "optimizer.lr": 1e-3})
    assert len(study.read_study(tmp_path)) == 2
    write_run(tmp_path, "twice", 3.0, **{"rng.seed": 1})
    with pytest.raises(UserError, match=r"first and .*twice are the same run: .*, seed 1; move"):
        study.read_study(tmp_path)


def test_differences_are_paired_by_seed_and_a_dash_where_the_teacher_is_another(tmp_path):
    tuned = {"teacher_model.pretrained_model_name_or_path": "study/tuned/final"}
    faster = {"optimizer.lr": 1e-3}
    runs = (
        ("ce1", 2.0, {"kd_ratio": 0, "rng.seed": 1}),
        ("ce2", 4.0, {"kd_ratio": 0, "rng.seed": 2}),
        ("ce3", 7.0, {"kd_ratio": 0, "rng.seed": 3}),
        ("kd1", 1.5, {"rng.seed": 1}),
        ("kd2", 3.75, {"rng.seed": 2}),
        ("tuned1", 1.0, {"rng.seed": 1} | tuned),
        ("fast1", 1.0, {"rng.seed": 1} | faster),
    )
    for name, ce, settings in runs:
        write_run(tmp_path, name, ce, **settings)
    found = study.read_study(tmp_path)
    lines = study.tabulate(found)
    assert lines[0] == "|  | seeds | CE | KL | SQuAD F1 |"
    assert lines[2] == (
        "| CE only | 3 | 4.333 [2.000, 7.000] | 3.333 [1.000, 6.000] | 0.500 [0.500, 0.500] |"
    )
    # Seeds 1 and 2: -0.5 and -0.25; there is no cross-entropy alone at the other learning rate.
    *_, plain, other, _, told = lines
    difference = "-0.375 [-0.500, -0.250]"
    same = "+0.000 [+0.000, +0.000]"
    assert plain == f"| KD, α 0.5, T 1 | 2 | {difference} | {difference} | {same} |"
    assert other.startswith("| KD, α 0.5, T 1, teacher tuned | 1 | -1.000 [-1.000, -1.000] | — |")
    assert told.endswith("not to be compared with the other rows: KD, α 0.5, T 1, teacher tuned")
    assert sum("optimizer.lr" in line for line in lines) == 1


def test_curves_are_averaged_by_step():
    assert study.average([([1, 2, 4], [1.0, 2.0, 4.0]), ([2, 4, 6], [4.0, 6.0, 9.0])]) == {
        2: 3.0,
        4: 5.0,
    }
    assert study.average([([1], [1.0]), ([], [])]) == {}


def test_the_figure_of_a_study_shows_every_setting_however_many_there_are(tmp_path):
    found: study.Study = {}
    for k in range(9):  # more than there are colours
        steps = range(1, 3 + k)  # and of different lengths
        records = [{"step": n, "val_ce_loss": 3.0 / n, "val_kl_at_t1": 2.0 / n} for n in steps]
        made = study.Setting(f"setting {k}", 0.5, 1.0, "teacher")
        found[made] = {"1": Run("one", records, {}, ""), "2": Run("other", records[:-1], {}, "")}
    study.draw(found, tmp_path / "s.svg")
    drawn = (tmp_path / "s.svg").read_text()
    assert [setting.name for setting in found if setting.name not in drawn] == []


def test_the_sweeps_of_the_studys_page_are_runs_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "ds_configs/runs/squad_study.yaml"
    page = (ROOT / "docs" / "results.md").read_text()
    commands = re.findall(r"^python launch/\w+\.py .*", page, re.MULTILINE)
    assert [each for each in commands if each not in (ROOT / config).read_text()] == []

    # The rows and models that the page names.
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "study" / "data").mkdir(parents=True)
    row = '{"context": "a", "question": "b", "answers": {"text": ["c"]}}'
    for name in ("squad_train", "squad_validation"):
        (tmp_path / "study" / "data" / f"{name}.jsonl").write_text(row)
    row = '{"ctx": "a", "endings": ["b", "c"], "label": 0}'
    (tmp_path / "study" / "data" / "hellaswag_validation.jsonl").write_text(row)
    for name in ("quickstart/teacher", "study/student", "study/tuned/final"):
        (tmp_path / name).mkdir(parents=True)
        tiny.weightless(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    sweeps = [words for words in map(str.split, commands) if words[1] == "launch/sweep.py"]
    runs = [run for words in sweeps for run in lay_out(words[3], words[4:], ())]
    assert len({run.mark for run in runs}) == len(runs) == 9 + 12 + 3
