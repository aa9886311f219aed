"""Find the checkpoint from which a run resumes, and read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_kd.checkpoint.engine import files as engine_files
from ds_kd.checkpoint.manifest import ENGINE, LATEST, STATE, CheckpointError, follow, verify
from ds_kd.checkpoint.retention import bad_in, list_course, set_aside, step_of, steps_in
from ds_kd.checkpoint.state import TrainState, set_rng_state
from ds_kd.errors import first_line
from ds_kd.parallel.world import World, barrier, on_rank0


def find(directory: Path, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that `LATEST` names, if it is whole.

    A damaged one is set aside, and the newest whole one on the way to it takes its place, or else
    another before it, or one after it. Without `LATEST` the newest whole one is returned, and None
    if there is no checkpoint.

    Raises:
        CheckpointError: no checkpoint is whole, or `LATEST` names something outside this directory
            that is not a whole checkpoint.
    """
    named, known = _read_latest(directory), steps_in(directory)
    if named is not None and named not in known:
        return _whole_elsewhere(directory, named)

    # A user who points LATEST back abandons the newer ones, which a run that goes on may pass.
    newer = known[: known.index(named)] if named is not None else []
    older, course = known[len(newer) :], list_course(directory, named)
    older.sort(key=lambda path: path not in course)
    for checkpoint in [*older, *newer]:
        try:
            verify(checkpoint)
        except CheckpointError as error:
            aside = set_aside(checkpoint)
            say(f"checkpoint {checkpoint.name} is damaged and was set aside as {aside.name}: "
                f"{error}")  # fmt: skip
            continue
        if newer and checkpoint not in newer:
            say(
                f"{LATEST} names {checkpoint.name}; what is newer ({', '.join(_names(newer))}) "
                f"stays until the run comes to its steps again"
            )
        return checkpoint
    if bad := bad_in(directory):
        raise CheckpointError(
            f"{directory}: none of {len(bad)} checkpoints is whole; they are kept as bad.step_…. "
            "Give checkpoint.checkpoint_dir another directory to start anew."
        )
    return None


def _read_latest(directory: Path) -> Path | None:
    """Return the path that `LATEST` names, or None; a checkpoint of this directory gets its path
    inside it."""
    link = directory / LATEST
    if not link.exists():
        return None
    resolved = follow(link)
    here = directory / resolved.name
    return here if here.resolve() == resolved and not here.is_symlink() else resolved


def _whole_elsewhere(directory: Path, named: Path) -> Path:
    try:
        verify(named)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory / LATEST} names {named}, which is no whole checkpoint ({error}); point it "
            f"to a step_… directory (ln -sfn step_… {directory / LATEST}) or remove it"
        ) from error
    return named


def _names(checkpoints: list[Path]) -> list[str]:
    return [path.name for path in sorted(checkpoints, key=lambda path: step_of(path) or 0)]


def load(
    engine: Any, state: TrainState, found: Path, scratch: Path, world: World, say: Any
) -> dict[str, Any]:
    """Read a checkpoint into the engine, `state` and this rank's generators (a collective).

    Args:
        scratch: a temporary directory for a checkpoint of another number of ranks.

    Returns:
        The content of `state.json`.

    Raises:
        CheckpointError: it holds another model, or cannot be resharded for this number of ranks.
    """
    saved = json.loads((found / STATE).read_text("utf-8"))
    try:
        # Earlier versions knew no cut matrices.
        before = saved["world_size"], saved.get("tensor_size", 1)
        if before == (world.size, world.tensor.size):
            loaded = engine_files.load_engine(engine, found, ENGINE)
        else:
            ranks = _describe_ranks(*before)
            loaded = _load_resharded(engine, found, ranks, scratch, world, say)
    except RuntimeError as error:
        raise CheckpointError(
            f"{found} does not fit this model ({first_line(error)}); give "
            f"checkpoint.checkpoint_dir another directory to start anew"
        ) from error

    if not loaded:
        raise CheckpointError(f"{found / ENGINE}: DeepSpeed found nothing to load")
    state.load_state_dict(saved["train_state"])
    rng = found / f"rng_rank{find_generators(world, saved.get('tensor_size', 1))}.pt"
    if rng.is_file():  # a rank beyond the saved number keeps its own seed
        set_rng_state(torch.load(rng, weights_only=True))
    return saved


def find_generators(world: World, parts: int) -> int:
    """Return the saved rank whose generators this rank takes over. Ranks that see the same tokens
    take the same, as their dropout masks must be equal.

    Args:
        parts: `distributed.tp_size` of the checkpoint.
    """
    same = parts == world.tensor.size
    return world.rank if same else world.tokens.rank * parts


def _load_resharded(
    engine: Any, found: Path, ranks: str, out: Path, world: World, say: Any
) -> bool:
    """Load a checkpoint of another number of ranks, or of ranks that were laid out otherwise (a
    collective)."""
    if lost := engine_files.find_lost_states(engine):
        raise CheckpointError(
            f"{found} was saved by {ranks}, and the {', '.join(lost)} of this optimizer cannot be "
            f"resharded for others; start {ranks} again"
        )
    if world.is_main:
        say(
            f"{found.name} was saved by {ranks} and is resharded for "
            f"{_describe_ranks(world.size, world.tensor.size)}: the batches and their order stay, "
            f"sums are rounded differently"
        )

    def cut() -> None:
        shutil.rmtree(out, ignore_errors=True)
        try:
            engine_files.reshard(found, ENGINE, out, world.tensor.size > 1)
        except KeyError:
            raise CheckpointError(
                f"{found} was saved by {ranks}, and only optimizers of Adam's family can go on "
                f"with others; start {ranks} again"
            ) from None

    # The copy is removed only after every rank has read it.
    try:
        on_rank0(cut, world)
        return engine_files.load_resharded(engine, out, ENGINE)
    finally:
        barrier(world)
        on_rank0(lambda: shutil.rmtree(out, ignore_errors=True), world)


def _describe_ranks(ranks: int, parts: int) -> str:
    """Return words for a layout."""
    return f"{ranks} ranks" + (f" with distributed.tp_size: {parts}" if parts > 1 else "")
