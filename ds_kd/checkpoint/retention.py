"""List the checkpoints of a directory, and decide which of them stay.

A checkpoint is a real directory called `step_` and its number, as `step_name` writes it. Whatever
else lies beside them, `step_0000004.keep` or a symbolic link of that name, belongs to somebody and
is left alone.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ds_kd.checkpoint.manifest import LATEST, STATE, fsync

_OURS = re.compile(r"\.(saving|pruned|replaced)\.step_\d{7,}|\.cut_anew|\.final\.(new|old)")
_BAD = re.compile(r"bad\.step_\d{7,}(\.\d+)?")


@dataclass(frozen=True)
class Retention:
    """The numbers of checkpoints that stay.

    Args:
        last: the newest ones; None keeps all.
        best: those of the lowest validation loss, besides.
    """

    last: int | None = None
    best: int = 1


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def step_of(path: Path) -> int | None:
    """Return the step that a path's name stands for; None for any other name."""
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
    """Return what a run killed between two file operations leaves under names of its own."""
    return [p for p in directory.glob(".*") if _OURS.fullmatch(p.name) and _is_real(p)]


def best_in(directory: Path) -> list[Path]:
    """Return the checkpoints whose validation loss is known, the lowest first.

    Losses over other validation data or with another `kd_ratio` are of another scale: only those
    are compared that were measured as the newest one up to `LATEST` was. A checkpoint that does
    not tell how it was measured is compared with all.
    """
    told = {path: _read_validation(path) for path in steps_in(directory)}
    known = {path: each for path, each in told.items() if each is not None}
    reached = step_of((directory / LATEST).resolve())
    course = [path for path in known if reached is None or (step_of(path) or 0) <= reached]
    measure = next((known[path][1] for path in course), None)
    if measure is not None:
        known = {path: each for path, each in known.items() if each[1] in (None, measure)}
    return sorted(known, key=lambda path: known[path][0])


def _read_validation(checkpoint: Path) -> tuple[float, dict | None] | None:
    """Return the validation loss of a checkpoint's weights and what it was measured with; None
    where they were not validated."""
    try:
        saved = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return None
    loss = saved.get("validation_loss")
    return None if loss is None else (loss, saved.get("validation"))


def superfluous(directory: Path, keep: Retention) -> list[Path]:
    """Return the checkpoints that need not stay.

    Those after `LATEST` are of a course that its user gave up by pointing it back: they are
    neither counted nor named here, and stay until the run comes to their step again.
    """
    if keep.last is None:
        return []
    latest = (directory / LATEST).resolve()
    reached = step_of(latest)
    course = [p for p in steps_in(directory) if reached is None or (step_of(p) or 0) <= reached]
    wanted = {latest, *(path.resolve() for path in best_in(directory)[: keep.best])}
    return [path for path in course[keep.last :] if path.resolve() not in wanted]


def prune(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half gone has lost its name."""
    aside = checkpoint.with_name(f".pruned.{checkpoint.name}")
    checkpoint.rename(aside)
    fsync(aside.parent)
    shutil.rmtree(aside)


def _is_real(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
