"""Find the models, the log and the held-out samples of a config's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ds_kd.checkpoint.manifest import BEST, FINAL, LATEST
from ds_kd.config.components import ConfigError
from ds_kd.config.schema import RunConfig
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_samples
from ds_kd.recipe.models import name_of, tokenizer_of


def models_of(cfg: RunConfig) -> dict[str, Path]:
    """Return the teacher, the student that a run starts from, and the one that it writes."""
    found = {"teacher": Path(name_of(cfg.teacher_model))} if cfg.teacher_model is not None else {}
    before, after = Path(name_of(cfg.model)), Path(cfg.checkpoint.checkpoint_dir) / FINAL
    return found | {"student before": before, "student after": after}


def log_of(cfg: RunConfig) -> Path:
    """Return the path of a run's metrics.jsonl."""
    return Path(cfg.tensorboard_dir) / "metrics.jsonl"


def name_best(directory: Path) -> str:
    """Return a line of a run's last message about the checkpoint of the lowest validation loss, or
    an empty text if that is the last one."""
    best = (directory / BEST).resolve()
    if not best.is_dir() or best == (directory / LATEST).resolve():
        return ""
    command = f"python launch/export.py {directory / BEST} OUT"
    return f"\nlowest validation loss: {best.name}; {command} writes its student"


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
