"""Publish a finished checkpoint as the newest one, and repair a directory that a killed run left.

`publish` takes single steps, and the directory is valid after each of them:

    .saving.step_N → step_N     the checkpoint is there
    LATEST → step_N             a started run goes on from it
    final                       its student, for transformers
    BEST, retention

A run that is killed before `LATEST` is switched resumes from the checkpoint before and makes this
one again. After that, `repair` and `complete` do the remaining steps. Both may be called at any
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_kd.checkpoint import manifest
from ds_kd.checkpoint.manifest import (
    BEST,
    CARD,
    FINAL,
    LATEST,
    MODEL,
    VALIDATION,
    CheckpointError,
    follow,
)
from ds_kd.checkpoint.retention import Retention, best_in, find_superfluous, leftovers_in, prune

FRESH_FINAL, _OLD_FINAL, _REPLACED = ".final.new", ".final.old", ".replaced."


def publish(aside: Path, target: Path, keep: Retention, say: Callable[[str], None]) -> None:
    """Rename `aside`, whose manifest is written, to the checkpoint `target`, and make it the newest
    one.

    A checkpoint that is already at `target` is replaced.

    Raises:
        OSError: a step failed; `repair` restores the directory.
    """
    directory = target.parent
    replaced = directory / f"{_REPLACED}{target.name}"
    if os.path.lexists(target):
        remove(replaced)
        target.rename(replaced)
    aside.rename(target)
    manifest.fsync(directory)
    manifest.switch_link(directory / LATEST, target.name)
    remove(replaced)
    if holds_student(target):
        _put_final(target, directory)
    _point_best(directory, set())
    try:
        retain(directory, keep)
    except OSError as error:  # the checkpoint is there, which is what counts
        say(f"an old checkpoint cannot be removed: {error}")


def complete(checkpoint: Path, directory: Path, puts_final: bool = True) -> None:
    """Make `LATEST`, `BEST` and, with `puts_final`, `final` agree with `checkpoint` as the newest
    one."""
    if follow(directory / LATEST) != checkpoint.resolve():
        manifest.switch_link(directory / LATEST, checkpoint.name)
    final = directory / FINAL
    if puts_final and holds_student(checkpoint) and not _is_student_of(final, checkpoint):
        _put_final(checkpoint, directory)
    _point_best(directory, set())


def note_validation(checkpoint: Path, loss: float, settings: dict[str, Any]) -> None:
    """Write the loss of a validation that was made after the checkpoint was saved, atomically
    beside its files, and make `BEST` agree."""
    aside = checkpoint / f".{VALIDATION}.new"
    aside.write_text(json.dumps({"validation_loss": loss, "validation": settings}), "utf-8")
    manifest.fsync(aside)
    aside.replace(checkpoint / VALIDATION)
    _point_best(checkpoint.parent, set())


def retain(directory: Path, keep: Retention) -> None:
    """Remove the checkpoints that are not kept, after `BEST` no longer names one of them."""
    doomed = find_superfluous(directory, keep)
    _point_best(directory, {*doomed})
    for checkpoint in doomed:
        prune(checkpoint)


def repair(directory: Path) -> None:
    """Undo or complete the interrupted step of a killed run; a checkpoint that was being written is
    removed.

    Raises:
        CheckpointError: `LATEST` or `BEST` is not a symbolic link.
    """
    for name in (LATEST, BEST):
        link = directory / name
        if os.path.lexists(link) and not link.is_symlink():
            raise CheckpointError(
                f"{link} is no symbolic link, as one it is written; remove it, or make it one "
                f"(ln -s step_… {link})"
            )
    for leftover in leftovers_in(directory):
        original = directory / leftover.name.removeprefix(_REPLACED)
        if leftover.name == _OLD_FINAL:
            original = directory / FINAL
        if leftover.name.startswith((_REPLACED, _OLD_FINAL)) and not os.path.lexists(original):
            leftover.rename(original)
        else:
            shutil.rmtree(leftover)


def holds_student(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds the student's consolidated weights."""
    return any((checkpoint / MODEL).glob("*.safetensors"))


def swap_final(directory: Path) -> None:
    """Replace `final` by the student that was written to `FRESH_FINAL`."""
    final, fresh, old = (directory / name for name in (FINAL, FRESH_FINAL, _OLD_FINAL))
    manifest.fsync(fresh)
    if os.path.lexists(final):
        remove(old)
        final.rename(old)
    fresh.rename(final)
    manifest.fsync(directory)
    remove(old)


def copy_small_files(checkpoint: Path, out: Path) -> None:
    """Copy the student's configuration and tokenizer into a new directory `out`."""
    remove(out)
    shutil.copytree(checkpoint / MODEL, out, ignore=shutil.ignore_patterns("*.safetensors"))


def remove(path: Path) -> None:
    """Remove a file, a directory or a symbolic link itself, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_final(checkpoint: Path, directory: Path) -> None:
    out = directory / FRESH_FINAL
    # Users edit the small files in place, so they are copied and not linked to the checkpoint's.
    copy_small_files(checkpoint, out)
    for source in (checkpoint / MODEL).glob("*.safetensors"):
        try:
            os.link(source, out / source.name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(source, out / source.name)
    for file in manifest.files_of(out):
        manifest.fsync(file)
    swap_final(directory)


def _is_student_of(final: Path, checkpoint: Path) -> bool:
    if final.is_symlink() or not final.is_dir():
        return False
    for name, want in manifest.read_files_of(checkpoint).items():
        # The card has fields for its user to fill, which stay while the student is the same.
        if not name.startswith(f"{MODEL}/") or name == f"{MODEL}/{CARD}":
            continue
        mine, theirs = final / name.removeprefix(f"{MODEL}/"), checkpoint / name
        if not mine.is_file():
            return False
        if not mine.samefile(theirs) and manifest.digest(mine) != want:
            return False
    return True


def _point_best(directory: Path, doomed: set[Path]) -> None:
    best = [path for path in best_in(directory) if path not in doomed]
    link = directory / BEST
    if best and follow(link) != best[0].resolve():
        manifest.switch_link(link, best[0].name)
    elif not best:
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
