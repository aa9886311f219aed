"""Identify settings, data and models, so that a resumed run notices what has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ds_kd.checkpoint.settings import LABELS, Settings
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import fingerprint_validation
from ds_kd.config.schema import RunConfig
from ds_kd.models.files.model_files import FILES, identity_of
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.models import name_of

_HASHED_SAMPLES = 64
#: Settings that change only the end of a run.
_LENGTH = ("step_scheduler.max_steps", "step_scheduler.num_epochs", "step_scheduler.patience")


def hash_samples(what: str, samples: Any) -> dict[str, str]:
    """Return the number of samples, and hashes of tokens and labels of samples spread over all,
    under names that begin with `what`."""
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
    """Return the settings and data that decide the validation loss of given weights, by name.

    Args:
        held_out: the samples of each validation set by its name.
    """
    found = fingerprint_validation(cfg)
    for name, samples in held_out.items():
        found |= hash_samples(f"validation {name}".strip(), samples)
    return found


def add_model_files(settings: Settings, cfg: RunConfig, world: World) -> None:
    """Add the identities of the student's and the teacher's files on rank 0 to the fingerprints
    that a resumed run compares."""
    used = [cfg.model, *([cfg.teacher_model] if cfg.teacher_model and cfg.kd_ratio > 0 else [])]

    def look() -> dict[str, str]:
        found = {part.key: identity_of(name_of(part), part.kwargs) for part in used}
        if (adapter := cfg.teacher.adapter) is not None and cfg.kd_ratio > 0:
            settings = Path(adapter, "adapter_config.json").read_text(encoding="utf-8")
            found["teacher.adapter"] = f"{identity_of(adapter, {})}, {_digest([settings])}"
        return {f"{key}{FILES}": text for key, text in found.items() if text is not None}

    found = on_rank0(look, world)
    settings.fingerprint |= found
    if cfg.validates:
        student = f"{cfg.model.key}{FILES}"
        settings.validation |= {name: found[name] for name in found if name != student}


def refuse_changes(cfg: RunConfig, changes: dict[str, str], onward: str) -> None:
    """Refuse a config with other settings than the finished run in its checkpoint directory.

    Args:
        changes: those of `Changes.fingerprint`; versions of libraries and the run's length
            are ignored.
        onward: the keys with which the finished run would go on.

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
