"""Save and restore the checkpoints of one run, in this layout.

    checkpoint_dir/
        step_0000200/           one checkpoint; written aside as .saving.step_…, verified, renamed
            engine/             DeepSpeed's shards: weights, optimizer, LR schedule
            state.json          TrainState, world size, fingerprint of the run
            config.yaml         the run's YAML with its overrides, secrets blanked
            rng_rank0.pt …      random-number generators of each rank
            rollouts.json       texts of the student that later steps still train on, if any
            model/              Hugging Face config, tokenizer and model card (README.md); the
                                weights too, if consolidated
            adapter/            LoRA weights as peft writes them, if the run trains such
            manifest.json       size and SHA-256 of every file above
        LATEST -> step_0000200          switched after the rename
        BEST   -> step_0000150          the checkpoint of the lowest validation loss
        final/                          the newest consolidated student, as real files
        RUNNING                         exists while a run uses the directory (`run_lock`)
        PREEMPTED                       exists while a run that a signal stopped has not gone on

A checkpoint holds the engine (weights, optimizer, LR schedule), `TrainState` (from which the
position in the data follows), the RNG of each rank, and what the student wrote for later steps.
DeepSpeed alone would write its `latest` before other ranks have finished, load flipped bytes
without noticing, and start from step 0 if `latest` is missing. So a manifest is written, and the
whole directory is renamed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ds_kd.checkpoint import manifest, publication, restore
from ds_kd.checkpoint.export import export_student
from ds_kd.checkpoint.manifest import (
    FINAL,
    LATEST,
    MODEL,
    ROLLOUTS,
    CheckpointError,
    error_of,
    follow,
)
from ds_kd.checkpoint.retention import Course, Retention, go_on_from, new_id, step_name, steps_in
from ds_kd.checkpoint.run_lock import DirectoryInUse, RunLock
from ds_kd.checkpoint.settings import Changes, Settings
from ds_kd.checkpoint.state import TrainState
from ds_kd.checkpoint.writer import Writer
from ds_kd.parallel.world import World, on_rank0

PREEMPTED = "PREEMPTED"
_BYTES_PER_SECOND = 3e8  # speed of a disk, hashing included, assumed until the first save


@dataclass
class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
        directory: `checkpoint.checkpoint_dir`.
        writer: writes the files of a checkpoint; all methods are collective over its ranks.
        save_consolidated: `final` exports the student with the last checkpoint, `every` with each,
            `false` with none.
        retention: the number of checkpoints that are kept.
        settings: those of this run, which a checkpoint keeps and `resume` compares.
        stops_on_failed_save: a checkpoint that cannot be written ends the run.
        patience: seconds between the launcher's SIGTERM and SIGKILL; None if it sends no SIGKILL.
        say: prints a line on rank 0.
        lock: this run's lock of the directory, on rank 0; without it nothing is published.
        changes: the differences that `resume` found in the settings.
        course: the number of this run and the branches of its way, as rank 0 has them.
    """

    directory: Path
    writer: Writer
    save_consolidated: str = "final"
    retention: Retention = Retention()
    settings: Settings = field(default_factory=Settings)
    stops_on_failed_save: bool = False
    patience: float | None = None
    say: Callable[[str], None] = print
    lock: RunLock | None = None
    changes: Changes = Changes()
    course: Course = field(default_factory=lambda: Course(new_id()))

    @property
    def world(self) -> World:
        return self.writer.world

    def save(
        self,
        engine: Any,
        state: TrainState,
        is_last: bool,
        validation_loss: float | None = None,
        must: bool = False,
    ) -> Path | None:
        """Write a checkpoint, and return its path once it is whole and `LATEST` names it.

        If it cannot be written (a full disk, a directory without rights), its files are removed,
        earlier checkpoints stay, and None is returned.

        Args:
            is_last: whether this is the run's last step, whose checkpoint `final` consolidates.
            validation_loss: the validation loss of these weights, if known; `keep_best` uses it.
            must: raise if it cannot be written, even if the run would go on without it.

        Raises:
            CheckpointError: it cannot be written, and the run must stop.
        """
        started = time.monotonic()
        try:
            target = self._save(engine, state, is_last, validation_loss)
            self._warn(time.monotonic() - started, "took")
            return target
        except (OSError, SafetensorError) as error:  # the writer raised it on all ranks
            on_rank0(lambda: error_of(lambda: publication.repair(self.directory)), self.world)
            kept = on_rank0(lambda: [p.name for p in steps_in(self.directory)[:1]], self.world)
            message = (
                f"the checkpoint of step {state.step} cannot be written: {error}; "
                f"{f'{kept[0]} is the last' if kept else 'there is none yet'}"
            )
            if must or is_last or self.stops_on_failed_save:
                raise CheckpointError(f"{message}. Make room, and start the run again.") from error
            if self.world.is_main:
                self.say(f"{message}; training goes on")
            return None

    def check_room(self, engine: Any) -> None:
        """Refuse to start a run if the disk has no room for one checkpoint (a collective).

        Raises:
            CheckpointError: names the bytes that are needed and free.
        """
        needed = self.writer.estimate_bytes(engine, self.save_consolidated != "false")

        def check() -> None:
            try:
                _check_free(self.directory, needed)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint.checkpoint_dir: no room for one checkpoint: {error}. Give "
                    f"another directory, or make room."
                ) from error

        on_rank0(check, self.world)
        self._warn(needed / _BYTES_PER_SECOND, "may take")

    def _warn(self, seconds: float, verb: str) -> None:
        """Warn once if a save takes longer than the launcher waits after SIGTERM."""
        if self.patience is not None and seconds > self.patience and self.world.is_main:
            self.say(
                f"a checkpoint {verb} {seconds:.0f} s, and this launcher kills a run "
                f"{self.patience:.0f} s after SIGTERM: stopped so, it would go on from the "
                f"checkpoint before. srun and launch/single_node.sh wait longer."
            )
            self.patience = None

    def _save(
        self, engine: Any, state: TrainState, is_last: bool, validation_loss: float | None
    ) -> Path:
        target = self.directory / step_name(state.step)
        aside = self.directory / f".saving.{target.name}"
        consolidate = self.save_consolidated == "every" or (
            self.save_consolidated == "final" and is_last
        )
        needed = self.writer.estimate_bytes(engine, consolidate)
        saved = {
            "validation_loss": validation_loss,
            "validation": self.settings.validation,
            "fingerprint": self.settings.fingerprint,
            "run": self.course.run,
            "branches": self.course.branches,
        }

        def prepare() -> None:
            self._check_lock()
            publication.remove(aside)
            (aside / MODEL).mkdir(parents=True)
            _check_free(self.directory, needed)

        def publish() -> None:
            manifest.write(aside, files)
            self._check_lock()
            publication.publish(aside, target, self.retention, self.say)

        # Nothing of an earlier checkpoint is touched before all ranks have written this one.
        on_rank0(prepare, self.world)
        files = self.writer.write(engine, state, saved, aside, consolidate)
        on_rank0(publish, self.world)
        return target

    def resume(self, engine: Any, state: TrainState, puts_final: bool = True) -> Path | None:
        """Restore the checkpoint that `LATEST` names, or the one that takes its place, and return
        its path; None if there is no checkpoint.

        A save that was interrupted is completed. Settings that differ from the checkpoint's are
        printed and kept in `changes`. Another number of ranks sees the same global batches in the
        same order.

        Args:
            puts_final: `final` becomes the student of this checkpoint, if that holds it.

        Raises:
            CheckpointError: no checkpoint is whole, or this one holds another model.
        """

        def find() -> Path | None:
            publication.repair(self.directory)
            return restore.find(self.directory, self.say)

        found = on_rank0(find, self.world)
        if found is None:
            if self.world.is_main and (self.directory / FINAL).exists():
                self.say(
                    f"{self.directory / FINAL} is there and no checkpoint: the run starts at step "
                    f"0, and its student will take that place"
                )
            return None

        # For another number of ranks the shards are converted in `scratch`.
        scratch = self.directory / ".resharded"
        saved = restore.load(engine, state, found, scratch, self.world, self.say)
        if self.writer.buffer is not None and (found / ROLLOUTS).is_file():
            self.writer.buffer.load_state_dict(json.loads((found / ROLLOUTS).read_text("utf-8")))
        self.changes = self.settings.compare(saved)
        self.course = on_rank0(lambda: go_on_from(found, self.directory), self.world)
        if self.world.is_main:
            for line in self.changes.fingerprint.values():
                self.say(f"resuming, but {line}")
        on_rank0(lambda: publication.complete(found, self.directory, puts_final), self.world)
        return found

    def export_final(self, engine: Any) -> None:
        """Write `final` for a finished run whose last checkpoint lacks the student's weights (a
        collective)."""
        found = self.newest()
        if self.save_consolidated == "false" or found is None:
            return
        if on_rank0(lambda: publication.holds_student(found), self.world):
            return
        fresh = self.directory / publication.FRESH_FINAL
        on_rank0(lambda: publication.copy_small_files(found, fresh), self.world)
        export_student(engine, fresh, self.world)
        on_rank0(lambda: publication.swap_final(self.directory), self.world)

    def newest(self) -> Path | None:
        """Return the checkpoint that `LATEST` names, without communication."""
        link = self.directory / LATEST
        return follow(link) if link.exists() else None

    def note_validation(self, step: int, loss: float) -> None:
        """Add the loss of a validation to the checkpoint of a step, which was saved before it."""
        checkpoint = self.directory / step_name(step)
        if self.world.is_main and checkpoint.is_dir():
            try:
                publication.note_validation(checkpoint, loss, self.settings.validation)
            except OSError as error:  # the checkpoint is there, which is what counts
                self.say(f"{checkpoint}: its validation loss cannot be noted: {error}")

    def mark(self, step: int, finished: bool) -> None:
        """Write the marker of a run that was stopped before its end, or remove it if it
        finished."""
        if not self.world.is_main:
            return
        marker = self.directory / PREEMPTED
        if finished:
            marker.unlink(missing_ok=True)
        else:
            marker.write_text(f"preempted at step {step}\n", "utf-8")

    def _check_lock(self) -> None:
        if self.lock is None:
            return
        try:
            self.lock.check()
        except DirectoryInUse as error:
            raise CheckpointError(f"{self.directory} was lost: {error}") from error


def _check_free(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"disk full: needed {needed / 2**20:,.1f} MiB, free {free / 2**20:,.1f} MiB in "
            f"{directory}"
        )
