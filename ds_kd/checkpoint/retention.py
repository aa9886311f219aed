"""List the checkpoints of a directory, tell which of them led to the newest, and decide which are
kept.

A checkpoint is a real directory with a name from `step_name`. Anything else, such as
`step_0000004.keep` or a symbolic link, belongs to the user and is never removed.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from ds_kd.checkpoint.manifest import LATEST, STATE, VALIDATION, follow, fsync
from ds_kd.files import parse_json, read_plain_file

_OURS = re.compile(r"\.(saving|pruned|replaced)\.step_\d{7,}|\.resharded|\.final\.(new|old)")
_LARGEST = 100_000_000  # bytes of a file of JSON
_BAD = re.compile(r"bad\.step_\d{7,}(\.\d+)?")


@dataclass(frozen=True)
class Retention:
    """The numbers of checkpoints that are kept.

    Args:
        last: number of the newest; None keeps all.
        best: number of those with the lowest validation loss, in addition.
    """

    last: int | None = None
    best: int = 1


@dataclass(frozen=True)
class Course:
    """The way on which a run has come to a checkpoint.

    Args:
        run: a number that no other run has; 0 if the checkpoint is of a version that told none.
        branches: step and number of each start that left newer checkpoints of this way behind, as a
            user had pointed `LATEST` back.
    """

    run: int = 0
    branches: tuple[tuple[int, int], ...] = ()

    def leads_by(self, other: Course, step: int) -> bool:
        """Return whether a checkpoint of a step and its own course `other` was passed on this way,
        as far as both tell."""
        count = len(other.branches)
        if 0 not in (self.run, other.run) and self.run != other.run:
            return False
        if other.branches != self.branches[:count]:
            return False
        return count == len(self.branches) or step <= self.branches[count][0]


def new_id() -> int:
    """Return a number that nothing else has, small enough for every reader of JSON."""
    return secrets.randbits(52) + 1


def id_of_earlier(checkpoint: Path) -> int:
    """Return the number of the run of a checkpoint that names none, as an earlier version wrote it;
    the same at each start."""
    digest = hashlib.sha256(str(checkpoint.resolve().parent).encode()).hexdigest()
    return int(digest[:13], 16) + 1


def read_course(checkpoint: Path) -> Course | None:
    """Return the course of a checkpoint, or None if its state cannot be read."""
    try:
        saved = parse_json(read_plain_file(checkpoint / STATE, _LARGEST))
        branches = tuple((int(step), int(number)) for step, number in saved.get("branches", []))
        return Course(int(saved.get("run", 0)), branches)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def go_on_from(checkpoint: Path, directory: Path) -> Course:
    """Return the course of a run that resumes from a checkpoint: its own, with another branch if
    newer ones of that course are left behind."""
    course, step = read_course(checkpoint) or Course(), step_of(checkpoint) or 0
    later = [path for path in steps_in(directory) if (step_of(path) or 0) > step]
    left = [each for path in later if (each := read_course(path)) is not None]
    branches = course.branches
    if any(each.branches == branches and course.leads_by(each, step) for each in left):
        branches = (*branches, (step, new_id()))
    return Course(course.run or id_of_earlier(checkpoint), branches)


def list_course(directory: Path, newest: Path | None = None) -> list[Path]:
    """Return the checkpoints on the way to `newest`, by default the one that `LATEST` names, newest
    first; without `LATEST` all. A course that cannot be read leaves out later steps alone."""
    newest = newest or follow(directory / LATEST)
    reached = step_of(newest)
    if reached is None:
        return steps_in(directory)
    found, course = [], read_course(newest)
    for path in steps_in(directory):
        own = None if course is None else read_course(path)
        is_passed = course is None or own is None or course.leads_by(own, step_of(path) or 0)
        if (step_of(path) or 0) <= reached and is_passed:
            found.append(path)
    return found


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's path, or None for another name."""
    found = re.fullmatch(r"step_(\d{7,})", path.name)
    step = int(found[1]) if found else -1
    return step if path.name == step_name(step) else None


def steps_in(directory: Path) -> list[Path]:
    """Return the published checkpoints, newest first."""
    steps = {path: step_of(path) for path in directory.glob("step_*") if _is_real(path)}
    known = {path: step for path, step in steps.items() if step is not None}
    return sorted(known, key=lambda path: known[path], reverse=True)


def bad_in(directory: Path) -> list[Path]:
    """Return the checkpoints that were set aside as damaged."""
    return [p for p in directory.glob("bad.step_*") if _BAD.fullmatch(p.name) and _is_real(p)]


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to a free name with `bad.` before it, and return that."""
    aside, number = checkpoint.with_name(f"bad.{checkpoint.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = checkpoint.with_name(f"bad.{checkpoint.name}.{number}")
    checkpoint.rename(aside)
    return aside


def leftovers_in(directory: Path) -> list[Path]:
    """Return the working files and directories that a killed run has left."""
    return [p for p in directory.glob(".*") if _OURS.fullmatch(p.name) and _is_real(p)]


def best_in(directory: Path) -> list[Path]:
    """Return the checkpoints whose validation loss is known and finite, the lowest loss first.

    Only those on the way to `LATEST` count. Losses over other validation data or with another
    `kd_ratio` have another scale: only those are compared that were measured as the newest one was,
    and those that do not say how they were measured.
    """
    told = {path: _read_validation(path) for path in list_course(directory)}
    known = {path: each for path, each in told.items() if each is not None}
    measure = next((measure for _, measure in known.values()), None)
    if measure is not None:
        known = {path: each for path, each in known.items() if each[1] in (None, measure)}
    finite = [path for path in known if math.isfinite(known[path][0])]  # nan has no order
    return sorted(finite, key=lambda path: known[path][0])


def _read_validation(checkpoint: Path) -> tuple[float, dict | None] | None:
    """Return the validation loss of a checkpoint and the settings it was measured with, or None if
    it was not validated."""
    for name in (VALIDATION, STATE):
        try:
            saved = parse_json(read_plain_file(checkpoint / name, _LARGEST))
        except (OSError, ValueError):
            continue
        loss = saved.get("validation_loss") if isinstance(saved, dict) else None
        if isinstance(loss, (int, float)):
            return loss, saved.get("validation")
    return None


def find_superfluous(directory: Path, keep: Retention) -> list[Path]:
    """Return the checkpoints that are not kept.

    A user who points `LATEST` back abandons the checkpoints after it. They are neither counted nor
    returned, and stay until the run saves at their steps again.
    """
    if keep.last is None:
        return []
    course = list_course(directory)
    wanted = {
        follow(directory / LATEST),
        *(path.resolve() for path in best_in(directory)[: keep.best]),
    }
    return [path for path in course[keep.last :] if path.resolve() not in wanted]


def prune(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no partial one has a checkpoint's name."""
    aside = checkpoint.with_name(f".pruned.{checkpoint.name}")
    checkpoint.rename(aside)
    fsync(aside.parent)
    shutil.rmtree(aside)


def _is_real(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
