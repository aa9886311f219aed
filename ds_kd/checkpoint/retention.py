"""List the checkpoints of a directory, and decide which of them are kept.

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


def new_id() -> int:
    """Return a number that nothing else has, small enough for every reader of JSON."""
    return secrets.randbits(52) + 1


def id_of_earlier(checkpoint: Path) -> int:
    """Return the number of the run of a checkpoint that names none, as an earlier version wrote it;
    the same at each start."""
    digest = hashlib.sha256(str(checkpoint.resolve().parent).encode()).hexdigest()
    return int(digest[:13], 16) + 1


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

    Losses over other validation data or with another `kd_ratio` have another scale. Only those are
    compared that were measured as the newest checkpoint up to `LATEST` was, and those that do not
    say how they were measured.
    """
    told = {path: _read_validation(path) for path in steps_in(directory)}
    known = {path: each for path, each in told.items() if each is not None}
    reached = step_of(follow(directory / LATEST))
    course = [path for path in known if reached is None or (step_of(path) or 0) <= reached]
    measure = next((known[path][1] for path in course), None)
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
    returned, and stay until the run reaches their steps again.
    """
    if keep.last is None:
        return []
    latest = follow(directory / LATEST)
    reached = step_of(latest)
    course = [p for p in steps_in(directory) if reached is None or (step_of(p) or 0) <= reached]
    wanted = {latest, *(path.resolve() for path in best_in(directory)[: keep.best])}
    return [path for path in course[keep.last :] if path.resolve() not in wanted]


def prune(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no partial one has a checkpoint's name."""
    aside = checkpoint.with_name(f".pruned.{checkpoint.name}")
    checkpoint.rename(aside)
    fsync(aside.parent)
    shutil.rmtree(aside)


def _is_real(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
