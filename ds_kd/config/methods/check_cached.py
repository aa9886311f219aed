"""Check what a cached teacher needs of the other keys."""

from __future__ import annotations

import os
from pathlib import Path

from ds_kd.config.checks.files import check_directory, is_directory
from ds_kd.config.components import problem
from ds_kd.config.losses import is_of_layers
from ds_kd.config.names import CACHE_RECORD, home_of
from ds_kd.config.schema import RunConfig
from ds_kd.config.signatures import divergences_by_name


def find_wrong_cache(cfg: RunConfig, data: dict) -> str:
    """Return the problem of a cached teacher, or an empty text."""
    key, given = "teacher.directory", cfg.teacher.directory
    command = "python launch/cache_teacher.py --config YAML --output DIR"
    if cfg.kd_loss_fn is not None and (unfit := _find_unfit_loss(cfg)):
        return unfit
    if given is None and data["teacher"].get("directory") is not None:  # its problem is told
        return ""
    if given is None:
        return f"{key}: missing; name the directory that {command} writes"
    if cfg.teacher.fill:
        if data.get("teacher_model") is None:
            return "teacher_model: missing; teacher.fill runs it where the cache lacks rows"
        return check_directory(key, given) or _find_other_files(given)
    if not is_directory(given) or not (Path(given) / CACHE_RECORD).is_file():
        expected = f"a directory with {CACHE_RECORD}"
        return problem(
            key, given, expected, f"{command} writes one, and so does teacher.fill: true"
        )
    return ""


def _find_other_files(directory: str) -> str:
    """Return the problem of a directory that holds something else than a cache, such as a model,
    whose files a cache's would then be taken for; or an empty text."""
    if not is_directory(directory) or (Path(directory) / CACHE_RECORD).is_file():
        return ""
    # A stopped run may have left parts of a cache there before its record.
    names = os.listdir(directory) if os.access(directory, os.R_OK) else []
    for name in sorted(names):
        if not name.startswith((".", "part-")) and name != "head.safetensors":
            expected = "a new directory, an empty one, or a cache"
            return problem("teacher.directory", directory, expected, f"it holds {name}")
    return ""


def _find_unfit_loss(cfg: RunConfig) -> str:
    """Return the problem of a loss that reads more of the teacher than its cache keeps, or an empty
    text."""
    if any(is_of_layers(part) for part in cfg.kd_losses):
        return (
            "kd_loss_fn: hidden_states compares layers, and teacher.directory keeps the last one "
            "alone; remove that loss, or teacher.kind: cached"
        )
    wanted, fits = cfg.teacher, {"top_k": "top_k", "sampled": "forward_kl"}.get(cfg.teacher.keep)
    if fits is None:
        return ""
    named = divergences_by_name()[fits]
    if cfg.kd_loss_fn.parts or home_of(cfg.kd_loss_fn.name) != home_of(named):
        return problem("teacher.keep", wanted.keep, f"hidden, or kd_loss_fn: {{name: {fits}}}")
    most = cfg.kd_loss_fn.kwargs.get("k", 64)
    if fits == "top_k" and isinstance(most, int) and most > wanted.k:
        return problem("teacher.k", wanted.k, f"at least kd_loss_fn.k {most}")
    return ""
