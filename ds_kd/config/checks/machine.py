"""Check that this machine has the packages and devices that a config needs."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version

from ds_kd.config.checks.files import find_missing_package, has_gpu
from ds_kd.config.components import ConfigError
from ds_kd.config.schema import RunConfig


def refuse_missing_packages(cfg: RunConfig) -> None:
    """Refuse to start a run whose models need packages that are not installed.

    Raises:
        ConfigError: names them.
    """
    if missing := _find_missing_packages(cfg):
        raise ConfigError(missing)


def notes_on_machine(cfg: RunConfig) -> list[str]:
    """Return the notes of `--check` about this machine."""
    notes = _find_missing_packages(cfg)
    if cfg.dist_env.backend == "nccl" and not has_gpu():
        notes.append("dist_env.backend: nccl needs CUDA; on this machine gloo takes its place")
    elif has_gpu() and "DS_ACCELERATOR" not in os.environ and "+cpu" in version("torch"):
        notes.append(
            f"torch {version('torch')} is a build without CUDA and this machine has a GPU: "
            f"bash launch/setup.sh here installs one with it; DS_ACCELERATOR=cpu uses the CPU"
        )
    if cfg.wandb is not None and importlib.util.find_spec("wandb") is None:
        notes.append("wandb: the package is not installed here; pip install wandb")
    return notes


def _find_missing_packages(cfg: RunConfig) -> list[str]:
    models = filter(None, (cfg.model, cfg.teacher_model))
    return [*filter(None, (find_missing_package(model.key, model.kwargs) for model in models))]
