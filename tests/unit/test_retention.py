"""The part of a checkpoint directory that is the run's own, and the part of it that stays."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from ds_kd.checkpoint import manifest, publication, restore
from ds_kd.checkpoint.manifest import CheckpointError
from ds_kd.checkpoint.retention import Course, Retention, go_on_from, new_id, steps_in


def make(
    path: Path,
    loss: float | None = None,
    student: bool = True,
    measure: dict | None = None,
    course: Course | None = None,
) -> Path:
    """A whole checkpoint as far as files go."""
    (path / "model").mkdir(parents=True)
    told = {} if measure is None else {"validation": measure}
    told |= {} if course is None else {"run": course.run, "branches": course.branches}
    (path / "state.json").write_text(json.dumps({"validation_loss": loss, **told}))
    (path / "model" / "config.json").write_text("{}")
    if student:
        (path / "model" / "model.safetensors").write_text(f"weights of {path.name}")
    files = {str(p.relative_to(path)): manifest.digest(p) for p in manifest.files_of(path)}
    manifest.write(path, files)
    return path


KEEP_ALL = Retention()
said: list[str] = []


def save(directory: Path, step: int, keep: Retention = KEEP_ALL, **options) -> None:
    target = directory / f"step_{step:07d}"
    aside = make(directory / f".saving.{target.name}", **options)
    publication.publish(aside, target, keep, said.append)


@pytest.fixture(autouse=True)
def silence():
    said.clear()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start(directory: Path) -> Path | None:
    """Do what a started run does before it trains."""
    publication.repair(directory)
    found = restore.find(directory, said.append)
    if found is not None:
        publication.complete(found, directory)
    return found


def damage(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("x")


def test_files_that_users_leave_beside_the_checkpoints_stay(tmp_path):
    theirs = ["step_0000004.keep", "step_by_step_notes", "step_4", "bad.step_4x", ".saving.mine"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    archive = make(tmp_path / "archive" / "step_0000001")
    (tmp_path / "step_0000001").symlink_to(archive)
    (tmp_path / ".saving.step_0000009").symlink_to(archive)
    make(tmp_path / ".saving.step_0000003")  # a killed save
    start(tmp_path)
    assert not (tmp_path / ".saving.step_0000003").exists()
    for step in (2, 4, 6):
        save(tmp_path, step, Retention(last=1))
    damage(tmp_path / "step_0000006")
    with pytest.raises(CheckpointError, match="none of 1"):
        start(tmp_path)
    for name in theirs:
        assert (tmp_path / name / "notes").read_text() == "mine"
    assert (tmp_path / "step_0000001").is_symlink() and (archive / "state.json").exists()
    assert (tmp_path / ".saving.step_0000009").is_symlink()
    assert steps_in(tmp_path) == []


def test_a_link_at_a_checkpoints_place_gives_way_and_what_it_names_stays(tmp_path):
    archive = make(tmp_path / "archive")
    (tmp_path / "step_0000002").symlink_to(archive)
    save(tmp_path, 2)
    assert not (tmp_path / "step_0000002").is_symlink() and (archive / "state.json").exists()


def test_latest_pointed_back_is_honoured_and_the_newer_ones_are_replaced_one_by_one(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    manifest.switch_link(tmp_path / "LATEST", "step_0000004")
    found = start(tmp_path)
    assert found == tmp_path / "step_0000004"
    assert "step_0000006, step_0000008" in said[0]
    assert (tmp_path / "final" / "model.safetensors").read_text().endswith("step_0000004")
    (tmp_path / "step_0000006" / "old").touch()
    save(tmp_path, 6, Retention(last=2))
    assert not (tmp_path / "step_0000006" / "old").exists()
    # 8 is of the course that was given up: neither counted nor removed before its step comes.
    assert [p.name[-1] for p in steps_in(tmp_path)] == ["8", "6", "4"]
    assert (tmp_path / "LATEST").resolve().name == "step_0000006"
    assert start(tmp_path) == tmp_path / "step_0000006"


def test_the_checkpoint_before_a_damaged_latest_takes_its_place_and_every_name_says_so(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, loss=9.0 - step)
    for time in ("bad.step_0000006", "bad.step_0000006.2"):
        damage(tmp_path / "step_0000006")
        assert start(tmp_path) == tmp_path / "step_0000004"
        assert (tmp_path / time).is_dir() and time in said[-1]
        assert (tmp_path / "LATEST").resolve().name == "step_0000004"
        assert (tmp_path / "BEST").resolve().name == "step_0000004"
        save(tmp_path, 6, loss=3.0)


def test_a_newer_checkpoint_takes_the_place_of_damaged_ones_before_it(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    manifest.switch_link(tmp_path / "LATEST", "step_0000004")
    for step in (2, 4):
        damage(tmp_path / f"step_000000{step}")
    assert start(tmp_path) == tmp_path / "step_0000008"
    assert sorted(path.name for path in tmp_path.glob("bad.*")) == [
        "bad.step_0000002",
        "bad.step_0000004",
    ]


def test_latest_may_name_a_checkpoint_elsewhere_and_must_name_a_whole_one(tmp_path):
    directory = tmp_path / "run"
    save_to = make(tmp_path / "other" / "step_0000003")
    directory.mkdir()
    save(directory, 6)
    (directory / "LATEST").unlink()
    (directory / "LATEST").symlink_to(save_to)
    assert start(directory) == save_to
    damage(save_to)
    with pytest.raises(CheckpointError, match=r"point it to a step_… directory"):
        start(directory)
    assert save_to.is_dir() and (directory / "LATEST").is_symlink()


def test_a_latest_that_was_copied_into_a_directory_is_refused_before_anything_is_removed(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "LATEST").unlink()
    shutil.copytree(tmp_path / "step_0000002", tmp_path / "LATEST")
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="no symbolic link"):
        start(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_final_is_whole_wherever_it_is_copied_and_whatever_is_deleted(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 2)
    save(tmp_path, 4, Retention(last=1))
    weights = tmp_path / "final" / "model.safetensors"
    assert weights.stat().st_nlink == (2 if links else 1)
    # An edit of a small file must not reach the checkpoint.
    (tmp_path / "final" / "config.json").write_text('{"edited": true}')
    manifest.verify(tmp_path / "step_0000004")
    shutil.rmtree(tmp_path / "step_0000004")
    shutil.copytree(tmp_path / "final", tmp_path / "copy", symlinks=True)
    assert (tmp_path / "copy" / "model.safetensors").read_text().endswith("step_0000004")


def test_the_link_that_final_used_to_be_is_replaced_by_files(tmp_path):
    save(tmp_path, 2)
    shutil.rmtree(tmp_path / "final")
    (tmp_path / "final").symlink_to("step_0000002/model")
    start(tmp_path)
    assert not (tmp_path / "final").is_symlink()
    assert (tmp_path / "step_0000002" / "model" / "model.safetensors").exists()
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_starting_again_and_again_changes_nothing(tmp_path):
    for step in (2, 4):
        save(tmp_path, step, loss=float(step))
    before = names(tmp_path), (tmp_path / "final").stat().st_ino
    for _ in range(2):
        assert start(tmp_path) == tmp_path / "step_0000004"
    assert (names(tmp_path), (tmp_path / "final").stat().st_ino) == before
    assert (tmp_path / "BEST").resolve().name == "step_0000002"


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_ends_nothing(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(tmp_path, 4, Retention(last=1), student=False)
    assert "cannot be removed" in said[0]
    assert (tmp_path / "LATEST").resolve().name == "step_0000004"


def test_best_never_names_what_is_not_there(tmp_path):
    for step, loss in ((2, 1.0), (4, 3.0), (6, 2.0)):
        save(tmp_path, step, Retention(last=1, best=0), loss=loss)
        assert (tmp_path / "BEST").exists()
    assert (tmp_path / "BEST").resolve().name == "step_0000006"


def test_best_compares_losses_of_the_same_data_only(tmp_path):
    def best():
        return (tmp_path / "BEST").resolve().name[-1]

    save(tmp_path, 1, loss=8.0)  # of a version that did not tell
    save(tmp_path, 2, loss=1.0, measure={"kd_ratio": 0.5})
    save(tmp_path, 3, measure={"kd_ratio": 1.0})  # not validated: nothing to compare yet
    assert best() == "2"
    save(tmp_path, 4, Retention(last=1), loss=5.0, measure={"kd_ratio": 1.0})
    save(tmp_path, 5, Retention(last=1), loss=6.0, measure={"kd_ratio": 1.0})
    assert best() == "4" and [p.name[-1] for p in steps_in(tmp_path)] == ["5", "4"]

    # After LATEST was pointed back, the course that was given up does not say what is compared.
    save(tmp_path, 6, loss=2.0, measure={"kd_ratio": 0.0})
    assert best() == "6"
    manifest.switch_link(tmp_path / "LATEST", "step_0000005")
    start(tmp_path)
    assert best() == "4"


def point_back(directory: Path, name: str) -> Course:
    """Do what a user does, and what the started run then is."""
    manifest.switch_link(directory / "LATEST", name)
    found = start(directory)
    assert found is not None and found.name == name
    return go_on_from(found, directory)


@pytest.mark.parametrize("number", [new_id(), None], ids=["numbered", "of an earlier version"])
def test_the_best_is_one_of_the_present_course(tmp_path, number):
    first = None if number is None else Course(number)
    for step, loss in ((100, 3.0), (200, 2.0), (300, 1.5)):
        save(tmp_path, step, loss=loss, course=first)
    second = point_back(tmp_path, "step_0000100")
    assert second.branches[0][0] == 100 and second.run == (number or second.run) > 0
    assert (tmp_path / "BEST").resolve().name == "step_0000100"
    for step, loss in ((150, 1.8), (170, 1.9), (190, 2.5)):
        save(tmp_path, step, Retention(last=1, best=1), loss=loss, course=second)
        assert (tmp_path / "BEST").resolve().name == "step_0000150"
    kept = [path.name[-3:] for path in steps_in(tmp_path)]
    assert kept == ["300", "200", "190", "150"]


def test_a_run_that_passes_abandoned_checkpoints_neither_counts_nor_takes_them(tmp_path):
    first, keep = Course(new_id()), Retention(last=2, best=1)
    for step, loss in ((100, 3.0), (213, 1.0), (313, 0.5)):
        save(tmp_path, step, loss=loss, course=first)
    second = point_back(tmp_path, "step_0000100")
    for step in (200, 300, 400):
        save(tmp_path, step, keep, loss=2.0 - step / 1000, course=second)
    assert [p.name[-3:] for p in steps_in(tmp_path)] == ["400", "313", "300", "213"]
    assert (tmp_path / "BEST").resolve().name == "step_0000400"
    # A start that leaves nothing behind goes on with the course that it finds.
    assert go_on_from(tmp_path / "step_0000400", tmp_path) == second

    # The last one before it on the same way takes the place of a damaged newest one.
    content = tmp_path / "step_0000400" / "model" / "config.json"
    content.write_text("damaged")
    assert start(tmp_path) == tmp_path / "step_0000300"
    assert go_on_from(tmp_path / "step_0000300", tmp_path) == second  # 313 is not of its course
    damage(tmp_path / "step_0000300")
    assert start(tmp_path) == tmp_path / "step_0000213"  # at last one that was given up
    assert go_on_from(tmp_path / "step_0000213", tmp_path).branches[0][0] == 213

    # A user who changes their mind takes up the first course.
    again = point_back(tmp_path, "step_0000313")
    assert again == first and (tmp_path / "BEST").resolve().name == "step_0000313"


def test_a_state_that_tells_nonsense_of_its_course_is_of_none(tmp_path):
    nonsense = [3, "x", {"run": "x"}, {"run": 1, "branches": 3}, {"branches": [[1]]}, {"run": None}]
    for step, told in enumerate(nonsense, 1):
        save(tmp_path, step, loss=1.0 + step)
        (tmp_path / f"step_{step:07d}" / "state.json").write_text(json.dumps(told))
    save(tmp_path, 9, Retention(last=3), loss=9.0, course=Course(new_id()))
    assert [path.name[-1] for path in steps_in(tmp_path)] == ["9", "6", "5"]


def refuse(*_, **__):
    raise OSError("not here")


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in ((2, 1.0), (4, 2.0), (6, math.nan), (8, math.inf)):
        save(tmp_path, step, Retention(last=1), loss=loss)
        assert (tmp_path / "BEST").resolve().name == "step_0000002"
    assert [p.name[-1] for p in steps_in(tmp_path)] == ["8", "2"]
