"""What survives the process.

    checkpoint_dir/
        step_0000200/           one checkpoint; written aside as .saving.step_…, verified, renamed
            engine/             DeepSpeed's shards: weights, optimizer, LR schedule
            state.json          TrainState, world size, fingerprint of the run
            rng_rank0.pt …      random-number generators of each rank
            model/              Hugging Face config and tokenizer; the weights too, if consolidated
            manifest.json       size and SHA-256 of every file above
        LATEST -> step_0000200          switched after the rename
        final  -> step_0000200/model    the newest consolidated student
        PREEMPTED                       there while a run waits to be started again after a signal

The list of what is saved is `Checkpointer.save`: engine (weights, optimizer, LR schedule),
`TrainState` (from which the position in the data follows) and every rank's RNG. DeepSpeed alone
would write its `latest` before other ranks have finished, load flipped bytes without a word, and
start from step 0 when `latest` is missing; hence the manifest and the rename.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_kd.distributed import World, barrier, on_rank0
from ds_kd.models import gathered
from ds_kd.shards import ShardWriter
from ds_kd.state import TrainState, rng_state, set_rng_state

ENGINE, MODEL, STATE, MANIFEST = "engine", "model", "state.json", "manifest.json"
LATEST, FINAL = "LATEST", "final"
PREEMPTED = "PREEMPTED"
_PREFIX = "model."  # models.Student holds the HF model as `.model`


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and what to do."""


def export_student(engine: Any, directory: Path, world: World) -> None:
    """Write the engine's student as Hugging Face safetensors, parameter by parameter (a
    collective).

    Rank 0 holds one shard above its training memory. Tied weights are written once; transformers
    ties them on loading.
    """
    model = engine.module.model
    writer = ShardWriter(directory) if world.is_main else None
    kept = model.state_dict().keys()  # leaves out buffers that are rebuilt on loading
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            if writer is not None:
                writer.add(name, parameter.detach().to("cpu", copy=True))
    if writer is not None:
        for name, buffer in model.named_buffers():
            if name in kept:
                writer.add(name, buffer.detach().to("cpu", copy=True))
        writer.close()
    barrier(world)


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write a saved checkpoint's student as a Hugging Face model, without a job or a GPU.

    The weights are DeepSpeed's fp32 master copies in the model's own dtype.

    Raises:
        CheckpointError: not a checkpoint of ds_kd, or damaged.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoConfig

    if not (checkpoint / MANIFEST).is_file():
        raise CheckpointError(
            f"{checkpoint}: no {MANIFEST} here; give a step_… directory or {LATEST} inside "
            f"checkpoint.checkpoint_dir"
        )
    verify(checkpoint)
    shutil.copytree(
        checkpoint / MODEL,
        out,
        dirs_exist_ok=True,
        ignore=lambda _, names: [n for n in names if "safetensors" in n],
    )
    dtype = AutoConfig.from_pretrained(out).dtype or torch.float32
    with trusted_pickles():
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), ENGINE, lazy_mode=True)
    writer, seen = ShardWriter(out), set()
    for name, lazy in weights.items():
        if id(lazy) not in seen:  # a tied weight appears under both names as one object
            seen.add(id(lazy))
            tensor = lazy.contiguous() if not isinstance(lazy, torch.Tensor) else lazy
            writer.add(name.removeprefix(_PREFIX), tensor.to(dtype))
    writer.close()


def pickle_stage_by_value() -> None:
    """Have DeepSpeed's one stored enum pickled as `ZeroStageEnum(3)` by every Python.

    Early releases of Python 3.11, Debian 12's among them, write `getattr(ZeroStageEnum, "weights")`
    instead, and `getattr` is nothing that a reader should allow.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@contextmanager
def trusted_pickles() -> Iterator[None]:
    """Let DeepSpeed read its own files with `weights_only=True`, the two classes it stores allowed.

    DeepSpeed calls `torch.load(weights_only=False)` everywhere; torch's environment switch
    overrules it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _digest(path: Path) -> dict[str, Any]:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{checkpoint / MANIFEST}: missing or unreadable") from None
    for name, want in listed.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != want["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {want['bytes']}")
        if _digest(path)["sha256"] != want["sha256"]:
            raise CheckpointError(f"{path}: content does not match its SHA-256")


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line each."""
    return [
        f"{name} was {saved.get(name)!r} and is {present.get(name)!r}"
        for name in sorted(saved.keys() | present.keys())
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
    ):
        self.directory, self.world, self.tokenizer = directory, world, tokenizer
        self.save_consolidated, self.keep_last, self.say = save_consolidated, keep_last, say
        self.fingerprint = fingerprint or {}

    def save(self, engine: Any, state: TrainState, is_last: bool) -> Path:
        """Write one checkpoint; when this returns, it is whole and `LATEST` names it."""
        target = self.directory / f"step_{state.step:07d}"
        aside = self.directory / f".saving.{target.name}"
        consolidate = self.save_consolidated == "every" or (
            self.save_consolidated == "final" and is_last
        )
        on_rank0(lambda: _fresh(aside / MODEL), self.world)
        pickle_stage_by_value()
        engine.save_checkpoint(str(aside), tag=ENGINE, save_latest=False)
        torch.save(rng_state(), aside / f"rng_rank{self.world.rank}.pt")
        on_rank0(lambda: self._write_small(engine, state, aside), self.world)
        if consolidate:
            export_student(engine, aside / MODEL, self.world)
        barrier(self.world)
        files = self._manifest(aside)
        on_rank0(lambda: self._publish(aside, target, files, consolidate), self.world)
        return target

    def resume(self, engine: Any, state: TrainState) -> Path | None:
        """Restore the newest good checkpoint; None when there is none at all.

        What has changed since it was saved is named, as the run will not be what it would have
        been.

        Raises:
            CheckpointError: checkpoints exist and none is good, or this one was saved by another
                number of ranks or holds another model.
        """
        found = on_rank0(self._newest_good, self.world)
        if found is None:
            return None
        saved = json.loads((found / STATE).read_text())
        if saved["world_size"] != self.world.size:
            raise CheckpointError(
                f"{found} was saved by {saved['world_size']} ranks and this run has "
                f"{self.world.size}; start it with "
                f"{saved['world_size']}, or give checkpoint.checkpoint_dir another directory "
                f"to start anew"
            )
        if self.world.is_main:
            for line in differences(saved.get("fingerprint", {}), self.fingerprint):
                self.say(f"resuming, but {line}")
        try:
            with trusted_pickles():
                loaded, _ = engine.load_checkpoint(str(found), tag=ENGINE)
        except RuntimeError as error:
            raise CheckpointError(
                f"{found} does not fit this model ({str(error).strip().splitlines()[0]}); give "
                f"checkpoint.checkpoint_dir another directory to start anew"
            ) from error
        if loaded is None:
            raise CheckpointError(f"{found / ENGINE}: DeepSpeed found nothing to load")
        state.load_state_dict(saved["train_state"])
        rng = found / f"rng_rank{self.world.rank}.pt"
        set_rng_state(torch.load(rng, weights_only=True))
        return found

    def mark(self, step: int, finished: bool) -> None:
        """Leave or remove the marker of a run that was stopped before its end (rank 0)."""
        marker = self.directory / PREEMPTED
        if finished:
            marker.unlink(missing_ok=True)
        else:
            marker.write_text(f"preempted at step {step}\n")

    def _write_small(self, engine: Any, state: TrainState, aside: Path) -> None:
        saved = {
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
        mine = _files(aside)[self.world.rank :: self.world.size]
        part = {str(p.relative_to(aside)): _digest(p) for p in mine}
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, part, group=self.world.host_group)
        return {name: digest for part in parts for name, digest in part.items()}

    def _publish(
        self, aside: Path, target: Path, files: dict[str, Any], consolidated: bool
    ) -> None:
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        _fsync(aside / MANIFEST)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _fsync(self.directory)
        _point(self.directory / LATEST, target.name)
        if consolidated:
            _point(self.directory / FINAL, f"{target.name}/{MODEL}")
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        wanted = {(self.directory / link).resolve() for link in (LATEST, FINAL)}
        wanted |= {path.parent for path in wanted}
        for old in self._all()[self.keep_last :]:
            if old.resolve() not in wanted:
                shutil.rmtree(old)

    def _all(self) -> list[Path]:
        """Every published checkpoint, newest first."""
        return sorted((p for p in self.directory.glob("step_*") if p.is_dir()), reverse=True)

    def _newest_good(self) -> Path | None:
        for leftover in self.directory.glob(".saving.*"):
            shutil.rmtree(leftover)  # of a run killed while saving
        candidates = self._all()
        for checkpoint in candidates:
            try:
                verify(checkpoint)
                return checkpoint
            except CheckpointError as error:
                bad = checkpoint.with_name(f"bad.{checkpoint.name}")
                shutil.rmtree(bad, ignore_errors=True)
                checkpoint.rename(bad)
                self.say(
                    f"checkpoint {checkpoint.name} is damaged and was set aside as {bad.name}: "
                    f"{error}"
                )
        if candidates:
            raise CheckpointError(
                f"{self.directory}: none of {len(candidates)} checkpoints is whole; they are "
                f"kept as bad.step_…. "
                "Give checkpoint.checkpoint_dir another directory to start anew."
            )
        return None


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in one step for whoever reads it."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    _fsync(link.parent)
