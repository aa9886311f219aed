"""Find the models, the log and the held-out samples of a config's run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ds_kd.checkpoint.checkpointer import PREEMPTED
from ds_kd.checkpoint.manifest import BEST, FINAL, LATEST, follow
from ds_kd.config.components import ConfigError, config_error
from ds_kd.config.schema import RunConfig
from ds_kd.errors import UserError
from ds_kd.evaluate.comparison import read_lines
from ds_kd.hub import find_directory
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_samples
from ds_kd.recipe.models import name_of, select_location, tokenizer_of


def models_of(cfg: RunConfig, given: dict[str, Path]) -> dict[str, Path]:
    """Return the directories of the teacher, the student that a run starts from, and the one that
    it writes; those given take their places.

    Raises:
        ConfigError: a model is neither a directory nor to be had from the hub.
    """
    parts = {"teacher": cfg.teacher_model, "student before": cfg.model}
    found = {}
    for label, part in parts.items():
        if label in given:
            found[label] = given[label]
        elif part is not None:
            expected = "a model's directory, or a hub id"
            with config_error(f"{part.key}.pretrained_model_name_or_path", name_of(part), expected):
                found[label] = find_directory(name_of(part), select_location(part))
    return found | {"student after": Path(cfg.checkpoint.checkpoint_dir) / FINAL} | given


def describe_without_final(cfg: RunConfig) -> str:
    """Return which run has written no student for transformers, what it has instead and what to
    type, or an empty text if the student is there."""
    directory = Path(cfg.checkpoint.checkpoint_dir)
    if (directory / FINAL).is_dir():
        return ""
    told = f"{directory / FINAL}: no Hugging Face model there: the run in {directory} has"
    if not directory.is_dir():
        return f"there is no directory {directory} of a run; checkpoint.checkpoint_dir=… names it"
    latest = follow(directory / LATEST)
    if latest.is_dir():
        command = f"python launch/export.py {directory / LATEST} OUT"
        return (
            f"{told} {latest.name} as its newest checkpoint; {command} writes that student, and "
            f"--student OUT compares it"
        )
    names = ", ".join(sorted(p.name for p in directory.iterdir() if not p.name.startswith(".")))
    return f"{told} no checkpoint yet; it holds {names or 'nothing'}"


def log_of(cfg: RunConfig) -> Path:
    """Return the path of a run's metrics.jsonl."""
    return Path(cfg.tensorboard_dir) / "metrics.jsonl"


def marker_of(cfg: RunConfig) -> Path:
    """Return the path of the file that is there while a run that a signal stopped is to go on."""
    directory = cfg.checkpoint.checkpoint_dir if cfg.checkpoint.enabled else cfg.tensorboard_dir
    return Path(directory) / PREEMPTED


def mark_without_checkpoints(cfg: RunConfig, step: int, finished: bool) -> None:
    """Write or remove the marker of a run that has no checkpointer to do it; call it on rank 0."""
    if cfg.checkpoint.enabled:
        return
    if finished:
        marker_of(cfg).unlink(missing_ok=True)
    else:
        marker_of(cfg).write_text(f"preempted at step {step}\n", "utf-8")


def closing_message(cfg: RunConfig, step: int, finished: bool) -> str:
    """Return the last message of a run: its best validation, the place of the result and what to
    type next."""
    directory = Path(cfg.checkpoint.checkpoint_dir)
    if cfg.step_scheduler.max_steps == 0:
        return f"validated after step {step}; nothing was trained or saved"
    if not finished:
        onward = f"the same command goes on from {directory / LATEST}"
        kept = onward if cfg.checkpoint.enabled else "nothing is kept, as checkpoints are off"
        return f"preempted at step {step}; {kept}"
    best = _describe_validation(cfg, step)
    if not cfg.checkpoint.enabled:
        return "\n".join(["done; nothing is kept, as checkpoints are off", *best])

    # The commands that use the student come last, to be copied.
    final = directory / FINAL
    hints: list[str] = []
    student = f"python launch/export.py {directory / LATEST} OUT writes it for transformers"
    if cfg.checkpoint.save_consolidated != "false" and final.exists():
        student = f"student: {final} (AutoModelForCausalLM.from_pretrained loads it)"
        how = "--chat" if (final / "chat_template.jinja").exists() else '--prompt "…"'
        hints = [f"try it: python launch/generate.py --model {final} {how}"]
    if cfg.tensorboard.enabled:
        hints.append(f"curves: tensorboard --logdir {cfg.tensorboard_dir}")
    lines = [*best, f"checkpoint: {directory / LATEST}", student, *_name_best(directory), *hints]
    return "\n".join(lines)


def _describe_validation(cfg: RunConfig, step: int) -> list[str]:
    """Return a line on the lowest validation loss of a run's log up to a step, if there is one."""
    try:
        records = read_lines(log_of(cfg))
    except UserError:  # no log, or a damaged one
        return []
    found = {r["step"]: r["val_loss"] for r in records if "val_loss" in r and r["step"] <= step}
    if not found:
        return []
    best = min(found, key=lambda at: (not math.isfinite(found[at]), found[at], at))
    first = f", {found[0]:.4f} before the first" if 0 in found and best else ""
    return [f"best validation: loss {found[best]:.4f} after step {best}{first}"]


def _name_best(directory: Path) -> list[str]:
    """Return a line on the checkpoint of the lowest validation loss, if that is not the last."""
    best = follow(directory / BEST)
    if not best.is_dir() or best == follow(directory / LATEST):
        return []
    command = f"python launch/export.py {directory / BEST} OUT"
    return [f"lowest validation loss: {best.name}; {command} writes its student"]


def held_out_samples(cfg: RunConfig) -> Any:
    """Return the samples that a run validates with; with several sets, those of the first.

    Raises:
        ConfigError: there are none, or they cannot be loaded.
    """
    alone = World(0, 1, torch.device("cpu"), "gloo")
    cfg.packed_sequence.packed_sequence_size = 0  # show single samples, not packs
    _, held_out = build_samples(cfg, tokenizer_of(cfg.model, alone), alone)
    if not held_out:
        raise ConfigError(["validation_dataset: missing, so there is no held-out row; give --data"])
    return next(iter(held_out.values()))
