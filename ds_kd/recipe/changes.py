"""Identities of settings, data and models, which a resumed run compares with its checkpoint's."""

from __future__ import annotations

import hashlib
from typing import Any

from ds_kd.checkpoint.checkpointer import LABELS, Checkpointer
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import fingerprint_validation
from ds_kd.config.schema import RunConfig
from ds_kd.models.model_files import FILES, identity_of
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.models import name_of

_HASHED_SAMPLES = 64
#: Settings that say when a run ends, and not what it is until then.
_LENGTH = ("step_scheduler.max_steps", "step_scheduler.num_epochs", "step_scheduler.patience")


def hash_samples(what: str, samples: Any) -> dict[str, str]:
    """Return the number of samples and hashes of the tokens and of the labels of some of them,
    spread over all, by names that begin with `what`."""
    count = len(samples)
    some = [samples[k] for k in range(0, count, max(1, count // _HASHED_SAMPLES))]
    tokens, labels = ([each[name] for each in some] for name in ("input_ids", "labels"))
    return {
        f"{what} data": f"{count} samples, {_digest(tokens)}",
        f"{what}{LABELS}": _digest(labels),
    }


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def fingerprint_validations(cfg: RunConfig, held_out: dict[str, Any]) -> dict[str, Any]:
    """Return what the validation loss of given weights depends on, by name.

    Args:
        held_out: the samples of each validation set by its name.
    """
    found = fingerprint_validation(cfg)
    for name, samples in held_out.items():
        found |= hash_samples(f"validation {name}".strip(), samples)
    return found


def add_model_files(checkpointer: Checkpointer, cfg: RunConfig, world: World) -> None:
    """Add the identity of the files of student and teacher, as rank 0 finds them, to what a resume
    compares."""
    used = [cfg.model, *([cfg.teacher_model] if cfg.teacher_model and cfg.kd_ratio > 0 else [])]

    def look() -> dict[str, str]:
        found = {part.key: identity_of(name_of(part), part.kwargs) for part in used}
        return {f"{key}{FILES}": text for key, text in found.items() if text is not None}

    found = on_rank0(look, world)
    checkpointer.fingerprint |= found
    if cfg.validates:
        student = f"{cfg.model.key}{FILES}"
        checkpointer.validation |= {name: found[name] for name in found if name != student}


def refuse_changes(cfg: RunConfig, changes: dict[str, str], onward: str) -> None:
    """Refuse a config that differs from the one of the finished run in its checkpoint directory.

    Args:
        changes: `Checkpointer.changes`; versions of libraries and what ends a run are ignored.
        onward: the keys that the finished run goes on with.

    Raises:
        ConfigError: names the changes.
    """
    harmless = ("ds_kd", "torch", "transformers", "deepspeed", *_LENGTH)
    lines = [line for name, line in changes.items() if name not in harmless]
    if lines:
        raise ConfigError([problem(
            "checkpoint.checkpoint_dir", cfg.checkpoint.checkpoint_dir,
            f"the settings of the run that is finished there, but {', '.join(lines)}",
            f"give another directory, or the old values; with {onward} the finished run goes on",
        )])  # fmt: skip
