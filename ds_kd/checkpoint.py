"""What survives the process.

    checkpoint_dir/
        step_0000200/           one checkpoint; written aside as .saving.step_…, verified, renamed
            engine/             DeepSpeed's shards: weights, optimizer, LR schedule
            state.json          TrainState, world size, fingerprint of the run
            rng_rank0.pt …      random-number generators of each rank
            model/              Hugging Face config and tokenizer; the weights too, if consolidated
            adapter/            LoRA weights as peft writes them, if the run trains such
            manifest.json       size and SHA-256 of every file above
        LATEST -> step_0000200          switched after the rename
        final  -> step_0000200/model    the newest consolidated student
        BEST   -> step_0000150          lowest validation loss of those that are there
        PREEMPTED                       there while a run waits to be started again after a signal

The list of what is saved is `Checkpointer.save`: engine (weights, optimizer, LR schedule),
`TrainState` (from which the position in the data follows) and every rank's RNG. DeepSpeed alone
would write its `latest` before other ranks have finished, load flipped bytes without a word, and
start from step 0 when `latest` is missing; hence the manifest and the rename.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ds_kd import lora, manifest, zero_files
from ds_kd.distributed import World, barrier, on_rank0, sum_over_ranks
from ds_kd.errors import first_line
from ds_kd.export import export_adapter, export_student
from ds_kd.manifest import ADAPTER, ENGINE, MODEL, CheckpointError, error_of, verify
from ds_kd.model_files import FILES
from ds_kd.state import TrainState, rng_state, set_rng_state

STATE = "state.json"
LATEST, FINAL, BEST = "LATEST", "final", "BEST"
PREEMPTED = "PREEMPTED"
_BYTES_PER_SECOND = 3e8  # of a disk, hashing included, before a first save has told


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line each."""
    unknown = {name for name in present.keys() - saved.keys() if name.endswith(FILES)}
    return [
        f"{name} was {saved.get(name)!r} and is {present.get(name)!r}"
        for name in sorted((saved.keys() | present.keys()) - unknown)
        if saved.get(name) != present.get(name)
    ]


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run.

    Args:
        directory: `checkpoint.checkpoint_dir`.
        world: ranks; all methods are collective.
        tokenizer: saved beside the model.
        save_consolidated: `final` exports the student with the last checkpoint, `every` with each,
            `false` with none.
        keep_last: how many checkpoints stay; None keeps all.
        keep_best: how many of the lowest validation losses stay besides.
        stops_on_failed_save: a checkpoint that cannot be written ends the run.
        patience: seconds that the launcher leaves a run after SIGTERM, if it is not patient.
        fingerprint: what the course of the run depends on, by name; plain values.
        say: prints on rank 0.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        tokenizer: Any,
        save_consolidated: str = "final",
        keep_last: int | None = None,
        fingerprint: dict[str, Any] | None = None,
        say: Any = print,
        keep_best: int = 1,
        stops_on_failed_save: bool = False,
        patience: float | None = None,
    ):
        self.directory, self.world, self.tokenizer = directory, world, tokenizer
        self.save_consolidated, self.keep_last, self.say = save_consolidated, keep_last, say
        self.fingerprint = fingerprint or {}
        self.patience = patience
        self.keep_best, self.stops_on_failed_save = keep_best, stops_on_failed_save

    def save(
        self,
        engine: Any,
        state: TrainState,
        is_last: bool,
        validation_loss: float | None = None,
        must: bool = False,
    ) -> Path | None:
        """Write one checkpoint; when this returns, it is whole and `LATEST` names it.

        Where it cannot be written (a full disk, a directory without rights), nothing of it stays,
        the checkpoints before it do, and None is returned.

        Args:
            is_last: of the run's steps; such a one is consolidated if any is.
            validation_loss: of exactly these weights, if known; `keep_best` goes by it.
            must: raise where it cannot be written, whatever `on_failed_save` says.

        Raises:
            CheckpointError: it cannot be written, and the run is to stop then.
        """
        started = time.monotonic()
        try:
            target = self._save(engine, state, is_last, validation_loss)
            self._warn(time.monotonic() - started, "took")
            return target
        except (OSError, SafetensorError) as error:  # on every rank, see `_all_well`
            aside = self._aside(state.step)
            on_rank0(lambda: shutil.rmtree(aside, ignore_errors=True), self.world)
            kept = on_rank0(lambda: [path.name for path in self._all()[:1]], self.world)
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
        """Refuse to start where not even one checkpoint has room (a collective).

        Raises:
            CheckpointError: with what is needed and what there is.
        """
        needed = self._needed(engine, self.save_consolidated != "false")

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
        """Say once where a save outlasts the launcher's patience."""
        if self.patience is not None and seconds > self.patience and self.world.is_main:
            self.say(
                f"a checkpoint {verb} {seconds:.0f} s, and this launcher kills a run "
                f"{self.patience:.0f} s after SIGTERM: stopped so, it would go on from the "
                f"checkpoint before. srun and launch/single_node.sh wait longer."
            )
            self.patience = None

    def _needed(self, engine: Any, consolidate: bool) -> int:
        """Bytes of a checkpoint, all ranks."""
        total = int(sum_over_ranks([zero_files.written_bytes(engine)], self.world)[0])
        if consolidate:
            total += sum(p.ds_numel * p.element_size() for p in engine.module.model.parameters())
        return total

    def _aside(self, step: int) -> Path:
        return self.directory / f".saving.step_{step:07d}"

    def _all_well(self, error: Exception | None) -> None:
        """Raise on every rank what any of them met (a collective)."""
        texts: list[Any] = [None] * self.world.size
        text = None if error is None else first_line(error)
        dist.all_gather_object(texts, text, group=self.world.host_group)
        for rank, text in enumerate(texts):
            if text is not None:
                raise OSError(f"rank {rank}: {text}")

    def _save(
        self, engine: Any, state: TrainState, is_last: bool, validation_loss: float | None
    ) -> Path:
        target = self.directory / f"step_{state.step:07d}"
        aside = self._aside(state.step)
        consolidate = self.save_consolidated == "every" or (
            self.save_consolidated == "final" and is_last
        )
        needed = self._needed(engine, consolidate)

        def prepare() -> None:
            _fresh(aside / MODEL)
            _check_free(self.directory, needed)

        on_rank0(prepare, self.world)
        self._all_well(zero_files.save_engine(engine, aside, ENGINE))
        rng = aside / f"rng_rank{self.world.rank}.pt"
        self._all_well(error_of(lambda: torch.save(rng_state(), rng)))
        on_rank0(lambda: self._write_small(engine, state, aside, validation_loss), self.world)
        if lora.has_adapter(engine.module.model):
            export_adapter(engine, aside / ADAPTER, self.world)
        if consolidate:
            export_student(engine, aside / MODEL, self.world)
        files = self._manifest(aside)
        on_rank0(lambda: self._publish(aside, target, files, consolidate), self.world)
        return target

    def resume(self, engine: Any, state: TrainState) -> Path | None:
        """Restore the newest good checkpoint; None when there is none at all.

        What has changed since it was saved is named, as the run will not be what it would have
        been. Another number of ranks sees the same global batches in the same order.

        Raises:
            CheckpointError: checkpoints exist and none is good, or this one holds another model.
        """
        found = on_rank0(self._newest_good, self.world)
        if found is None:
            return None
        saved = json.loads((found / STATE).read_text())
        if self.world.is_main:
            for line in differences(saved.get("fingerprint", {}), self.fingerprint):
                self.say(f"resuming, but {line}")
        try:
            if saved["world_size"] == self.world.size:
                loaded = zero_files.load_engine(engine, found, ENGINE)
            else:
                loaded = self._load_cut_anew(engine, found, saved["world_size"])
        except CheckpointError:
            raise
        except RuntimeError as error:
            raise CheckpointError(
                f"{found} does not fit this model ({first_line(error)}); give "
                f"checkpoint.checkpoint_dir another directory to start anew"
            ) from error
        if not loaded:
            raise CheckpointError(f"{found / ENGINE}: DeepSpeed found nothing to load")
        state.load_state_dict(saved["train_state"])
        rng = found / f"rng_rank{self.world.rank}.pt"
        if rng.is_file():  # a rank more than there were draws from its own seed
            set_rng_state(torch.load(rng, weights_only=True))
        return found

    def _load_cut_anew(self, engine: Any, found: Path, ranks: int) -> bool:
        """Into another number of ranks."""
        if lost := zero_files.states_not_cut(engine):
            raise CheckpointError(
                f"{found} was saved by {ranks} ranks, and the {', '.join(lost)} of this optimizer "
                f"cannot be cut for another number; start {ranks} again"
            )
        if self.world.is_main:
            self.say(
                f"{found.name} was saved by {ranks} ranks and is cut anew for {self.world.size}: "
                f"the same batches in the same order, rounded otherwise"
            )
        out = self.directory / ".cut_anew"

        def cut() -> None:
            shutil.rmtree(out, ignore_errors=True)
            try:
                zero_files.cut_anew(found, ENGINE, out)
            except KeyError:
                raise CheckpointError(
                    f"{found} was saved by {ranks} ranks, and only optimizers of Adam's family can "
                    f"go on with another number; start {ranks} again"
                ) from None

        try:
            on_rank0(cut, self.world)
            return zero_files.load_cut_anew(engine, out, ENGINE)
        finally:
            barrier(self.world)
            on_rank0(lambda: shutil.rmtree(out, ignore_errors=True), self.world)

    def newest(self) -> Path | None:
        """The checkpoint that `LATEST` names, by this rank's eyes alone."""
        link = self.directory / LATEST
        return link.resolve() if link.exists() else None

    def mark(self, step: int, finished: bool) -> None:
        """Leave or remove the marker of a run that was stopped before its end (rank 0)."""
        marker = self.directory / PREEMPTED
        if finished:
            marker.unlink(missing_ok=True)
        else:
            marker.write_text(f"preempted at step {step}\n")

    def _write_small(
        self, engine: Any, state: TrainState, aside: Path, validation_loss: float | None
    ) -> None:
        saved = {
            "validation_loss": validation_loss,
            "train_state": state.state_dict(),
            "world_size": self.world.size,
            "fingerprint": self.fingerprint,
        }
        (aside / STATE).write_text(json.dumps(saved))
        model = engine.module.model
        model.config.save_pretrained(aside / MODEL)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside / MODEL)
        self.tokenizer.save_pretrained(aside / MODEL)

    def _manifest(self, aside: Path) -> dict[str, Any]:
        """Size and hash of every file, the work shared out over the ranks; whole on rank 0."""
        mine = manifest.files_of(aside)[self.world.rank :: self.world.size]
        part: dict[str, Any] = {}

        def add_up() -> None:  # where the disk is full, syncing may be what tells
            part.update({str(p.relative_to(aside)): manifest.digest(p) for p in mine})

        self._all_well(error_of(add_up))
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, part, group=self.world.host_group)
        return {name: digest for part in parts for name, digest in part.items()}

    def _publish(
        self, aside: Path, target: Path, files: dict[str, Any], consolidated: bool
    ) -> None:
        manifest.write(aside, files)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        manifest.fsync(self.directory)
        manifest.point(self.directory / LATEST, target.name)
        if consolidated:
            manifest.point(self.directory / FINAL, f"{target.name}/{MODEL}")
        best = self._best()
        if best:
            manifest.point(self.directory / BEST, best[0].name)
        self._prune(best[: self.keep_best])

    def _prune(self, best: list[Path]) -> None:
        if self.keep_last is None:
            return
        wanted = {(self.directory / link).resolve() for link in (LATEST, FINAL)}
        wanted |= {path.parent for path in wanted} | {path.resolve() for path in best}
        for old in self._all()[self.keep_last :]:
            if old.resolve() not in wanted:
                shutil.rmtree(old)

    def _best(self) -> list[Path]:
        """The checkpoints whose validation loss is known, the lowest first."""
        losses = {path: validation_loss_of(path) for path in self._all()}
        known = {path: loss for path, loss in losses.items() if loss is not None}
        return sorted(known, key=lambda path: known[path])

    def _all(self) -> list[Path]:
        """Every published checkpoint, newest first."""
        return sorted((p for p in self.directory.glob("step_*") if p.is_dir()), reverse=True)

    def _newest_good(self) -> Path | None:
        # Of a run killed while saving, or while cutting one anew.
        for leftover in [*self.directory.glob(".saving.*"), *self.directory.glob(".cut_anew")]:
            shutil.rmtree(leftover)
        candidates = self._all()
        for checkpoint in candidates:
            try:
                verify(checkpoint)
                return checkpoint
            except CheckpointError as error:
                aside = checkpoint.with_name(f"bad.{checkpoint.name}")
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)
                self.say(
                    f"checkpoint {checkpoint.name} is damaged and was set aside as {aside.name}: "
                    f"{error}"
                )
        if bad := list(self.directory.glob("bad.step_*")):
            raise CheckpointError(
                f"{self.directory}: none of {len(bad)} checkpoints is whole; they are "
                f"kept as bad.step_…. "
                "Give checkpoint.checkpoint_dir another directory to start anew."
            )
        return None


def validation_loss_of(checkpoint: Path) -> float | None:
    """Of a checkpoint's weights; None where they were not validated."""
    try:
        return json.loads((checkpoint / STATE).read_text()).get("validation_loss")
    except (OSError, ValueError):
        return None


def _check_free(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"disk full: needed {needed / 2**20:.0f} MiB, free {free / 2**20:.0f} MiB in "
            f"{directory}"
        )


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
