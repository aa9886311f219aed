"""Find keys that have no effect because another key switches them off, and note each."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import Component
from ds_kd.config.schema import CACHED, RunConfig

_NEEDS_WORKERS = ("worker_init_fn", "multiprocessing_context", "in_order")
_WITH_A_VALIDATION = (
    "step_scheduler.val_every_steps", "step_scheduler.val_at_start", "step_scheduler.patience",
    "step_scheduler.val_samples",
)  # fmt: skip
_OF_CHECKPOINTS = (
    "step_scheduler.ckpt_every_steps", "checkpoint.save_consolidated", "checkpoint.keep_last",
    "checkpoint.keep_best", "checkpoint.on_failed_save",
)  # fmt: skip
_OF_COMPILE = ("compile.mode", "compile.dynamic", "compile.backend")
_OF_LOADING = (
    "dataloader.num_workers", "dataloader.group_by_length", "dataloader.prefetch_factor",
    "dataloader.persistent_workers", "dataloader.pin_memory",
)  # fmt: skip
_OF_A_CACHE = (
    "teacher.directory", "teacher.fill", "teacher.dtype", "teacher.keep", "teacher.k",
)  # fmt: skip
_OF_THE_TEACHER = (
    "teacher_model", "offload_teacher_model", "deepspeed.teacher", "teacher.placement",
    "teacher.window", "teacher_distributed",
)  # fmt: skip


def find_idle_keys(cfg: RunConfig, data: dict[str, Any]) -> list[str]:
    """Return a note for each key of `data` that has a value and no effect.

    Args:
        cfg: the checked config.
        data: the keys that the YAML sets, without defaults.
    """
    found: dict[str, str] = {}
    for is_off, keys, reason in _list_rules(cfg):
        for key in keys if is_off else ():
            if _is_set(data, key):
                found.setdefault(key, f"{key}: has no effect, as {reason}")

    notes = [*found.values()]
    for dataset in filter(None, (cfg.dataset, *cfg.validation_dataset.values())):
        notes += _note_idle_lengths(dataset, data)
    for loader in filter(None, (cfg.dataloader, cfg.validation_dataloader)):
        notes += _note_idle_loader_keys(loader, data, cfg.packed_sequence.packed_sequence_size > 0)
    return notes


def _list_rules(cfg: RunConfig) -> list[tuple[Any, tuple[str, ...], str]]:
    """Return whether keys are switched off, the keys and the reason, of which the first counts."""
    checkpoints_off, steps = not cfg.checkpoint.enabled, cfg.step_scheduler
    validates = cfg.validates
    containers = cfg.slurm is not None and cfg.slurm.container_image
    windows = cfg.teacher.window not in ("auto", 1) and cfg.distributed.ranks_per_sample > 1
    once = cfg.deepspeed.reduce_once == "true" and (cfg.distributed.tp_size or 1) > 1

    # The widest reason comes first, as a key is told one.
    return [
        (not validates, (*_WITH_A_VALIDATION, "validation_dataloader"),
         "there is no validation_dataset or validation_share"),
        (checkpoints_off, _OF_CHECKPOINTS, "checkpoints are off"),
        (steps.val_every_steps is None, ("step_scheduler.patience",),
         "without step_scheduler.val_every_steps the run validates after its last step only"),
        (cfg.keep_last is None, ("checkpoint.keep_best",),
         "without checkpoint.keep_last every checkpoint stays"),
        (not validates, ("checkpoint.keep_best",),
         "there is no validation_dataset or validation_share"),
        (cfg.compile.enabled == "false", _OF_COMPILE, "compile.enabled is false"),
        (not containers, ("slurm.container_mounts",), "there is no slurm.container_image"),
        (cfg.kd_ratio == 0 and not validates, (*_OF_THE_TEACHER, "kd_loss_fn"), "kd_ratio is 0"),
        (cfg.teacher_model is None, _OF_THE_TEACHER[1:], "there is no teacher_model"),
        (cfg.kd_ratio == 0 and not validates, ("teacher",), "kd_ratio is 0"),
        (cfg.teacher.kind != CACHED, _OF_A_CACHE, f"teacher.kind is {cfg.teacher.kind}"),
        (cfg.teacher.kind == CACHED, ("teacher.window",), "a cache is filled batch by batch"),
        (windows, ("teacher.window",), "ranks that share samples take one micro-batch at a time"),
        (once, ("deepspeed.reduce_once",), "gradients of cut matrices are exchanged in each pass"),
        (cfg.teacher.keep == "hidden", ("teacher.k",), "hidden states are kept"),
        (cfg.teacher.keep != "hidden", ("teacher.dtype",), f"teacher.keep is {cfg.teacher.keep}"),
        (cfg.reads_cache and not cfg.teacher.fill, _OF_THE_TEACHER[1:],
         "the teacher is read from a cache"),
        (not cfg.rolls_out, ("rollouts",), "rollouts.ratio is 0"),
        (cfg.rolls_out, _OF_LOADING, "rollouts make each step's micro-batches when it begins"),
    ]  # fmt: skip


def _is_set(data: dict[str, Any], key: str) -> bool:
    """Return whether the YAML gives this key a value that asks for something."""
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value not in (None, False, {}, [])


def _note_idle_lengths(dataset: Component, data: dict[str, Any]) -> list[str]:
    """Return a note on a `seq_length` without truncation or padding, or the reverse."""
    kwargs, key = dataset.kwargs, dataset.key
    if not dataset.name.startswith("ds_kd.data."):
        return []
    cuts = kwargs.get("truncation") not in (None, False, "do_not_truncate")
    if kwargs.get("seq_length") is not None and not cuts and kwargs.get("padding") != "max_length":
        return [f"{key}.seq_length: has no effect, as nothing is cut; add truncation: true"]
    if cuts and kwargs.get("seq_length") is None:
        return [f"{key}.truncation: has no effect, as there is no seq_length"]
    if kwargs.get("pad_to_max_length"):
        return [f"{key}.pad_to_max_length: has no effect, as the collater pads each batch"]
    return []


def _note_idle_loader_keys(loader: Component, data: dict[str, Any], packs: bool) -> list[str]:
    """Return notes on arguments of a loader that need packing off or worker processes."""
    notes = []
    if packs and loader.kwargs.get("group_by_length"):
        notes.append(f"{loader.key}.group_by_length: has no effect, as samples are packed")
    if not loader.kwargs.get("num_workers"):
        for name in _NEEDS_WORKERS:
            if _is_set(data, f"{loader.key}.{name}"):
                notes.append(f"{loader.key}.{name}: has no effect on a CPU, as num_workers is 0")
    return notes
