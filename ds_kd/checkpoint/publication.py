"""Publish a finished checkpoint as the newest one, and repair what a killed run left.

`publish` is a row of single steps, each of which leaves a directory that a reader understands:

    .saving.step_N → step_N     the checkpoint is there
    LATEST → step_N             a started run goes on from it
    final                       its student, for transformers
    BEST, retention

Killed before `LATEST`, a run goes on from the one before and makes the same checkpoint again;
killed after, `repair` and `complete` do what was left. Both may be called at any time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ds_kd.checkpoint import manifest
from ds_kd.checkpoint.manifest import BEST, CARD, FINAL, LATEST, MODEL, CheckpointError
from ds_kd.checkpoint.retention import Retention, best_in, leftovers_in, prune, superfluous

FRESH_FINAL, _OLD_FINAL, _REPLACED = ".final.new", ".final.old", ".replaced."


def publish(aside: Path, target: Path, keep: Retention, say: Callable[[str], None]) -> None:
    """Make `aside`, whose manifest is written, the checkpoint `target` and the newest one.

    What an earlier course of the run left at `target` is replaced.

    Raises:
        OSError: it cannot be done; `repair` brings the directory in order.
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


def complete(checkpoint: Path, directory: Path) -> None:
    """Have `LATEST`, `final` and `BEST` say what follows from `checkpoint` being the newest."""
    if (directory / LATEST).resolve() != checkpoint.resolve():
        manifest.switch_link(directory / LATEST, checkpoint.name)
    if holds_student(checkpoint) and not _is_student_of(directory / FINAL, checkpoint):
        _put_final(checkpoint, directory)
    _point_best(directory, set())


def retain(directory: Path, keep: Retention) -> None:
    """Remove the checkpoints that need not stay, `BEST` never naming one of them."""
    doomed = superfluous(directory, keep)
    _point_best(directory, {*doomed})
    for checkpoint in doomed:
        prune(checkpoint)


def repair(directory: Path) -> None:
    """Undo or end what a killed run was in the middle of; what it was writing is thrown away.

    Raises:
        CheckpointError: `LATEST` or `BEST` is something else than a symbolic link.
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
    """Return whether a checkpoint has its student's weights for transformers."""
    return any((checkpoint / MODEL).glob("*.safetensors"))


def swap_final(directory: Path) -> None:
    """Put the whole student that lies aside at `final`, in place of what is there."""
    final, fresh, old = (directory / name for name in (FINAL, FRESH_FINAL, _OLD_FINAL))
    manifest.fsync(fresh)
    if os.path.lexists(final):
        remove(old)
        final.rename(old)
    fresh.rename(final)
    manifest.fsync(directory)
    remove(old)


def copy_small_files(checkpoint: Path, out: Path) -> None:
    """Copy what a student has besides weights (configuration, tokenizer) into a new `out`."""
    remove(out)
    shutil.copytree(checkpoint / MODEL, out, ignore=shutil.ignore_patterns("*.safetensors"))


def remove(path: Path) -> None:
    """Remove whatever stands there; of a symbolic link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_final(checkpoint: Path, directory: Path) -> None:
    out = directory / FRESH_FINAL
    # Small files are edited in place, and an edit must not reach the checkpoint: no links to them.
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
    if best and link.resolve() != best[0].resolve():
        manifest.switch_link(link, best[0].name)
    elif not best:
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
