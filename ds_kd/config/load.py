"""Load a YAML and its overrides into a checked, typed `RunConfig`.

All problems are reported together, before a model is loaded. Each names the key, the value given,
the value expected and what to type next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_kd import __version__
from ds_kd.config.checks.combinations import (
    find_contradictions,
    misfit_of_batch,
    note_on_timeout,
)
from ds_kd.config.checks.components import (
    check_component,
    check_components,
    note_on_absent_code,
)
from ds_kd.config.checks.files import check_directory, note_on_model
from ds_kd.config.checks.idle_keys import find_idle_keys
from ds_kd.config.checks.sections import check_section
from ds_kd.config.checks.tokenizers import find_missing_template, find_other_tokenizer
from ds_kd.config.components import Component, ConfigError, problem
from ds_kd.config.keys import ComponentRules, keys_of
from ds_kd.config.losses import check_divergence
from ds_kd.config.methods.check_adapter import note_on_adapter
from ds_kd.config.methods.check_placement import note_on_placement
from ds_kd.config.methods.check_tensor import count_copies, note_on_machines
from ds_kd.config.methods.rollouts import add_defaults
from ds_kd.config.names import LOSSES
from ds_kd.config.nemo import Translation
from ds_kd.config.permissions import mark_permitted
from ds_kd.config.reference.keys import every_key
from ds_kd.config.schema import Rng, RunConfig
from ds_kd.config.signatures import signature_of
from ds_kd.config.text.yaml_source import read


def load(
    path: str | Path | dict[str, Any],
    overrides: list[str] | None = None,
    allow: tuple[str, ...] = (),
    config_only: bool = False,
) -> RunConfig:
    """Return the checked config of a YAML and its overrides.

    Args:
        path: the YAML, or its content as a mapping.
        overrides: `a.b.c=value`, the value read as YAML; `null` drops a section.
        allow: prefixes of `_target_` names that the command line permits.
        config_only: a plan is made, for which a model needs only its config.json.

    Raises:
        ConfigError: lists all problems.
    """
    data, text, source = read(path, overrides or [], _list_known())
    with source.add_places():
        return replace(_check(mark_permitted(data, allow), config_only), text=text, source=source)


def _list_known() -> set[str]:
    """Return the dotted names of the schema's keys but those that take any value."""
    known = set()
    for name, key in keys_of(RunConfig).items():
        inner = keys_of(key.section) if key.section else {}
        known |= {f"{name}.{part}" for part in inner}
        known |= set() if inner or key.annotation is Any else {name}
    return known


def _check(data: dict, config_only: bool) -> RunConfig:
    """Return the typed config of a YAML's values.

    Raises:
        ConfigError: lists all problems.
    """
    written = data.get("lr_scheduler")
    data = add_defaults(data)
    translated = Translation(data)
    problems = translated.problems
    values = check_section(RunConfig, data, "", problems)
    for name, key in keys_of(RunConfig).items():
        if key.component is not None:
            check = _checker_of(key.component)
            values[name] = check(data.get(name), key, config_only, problems)
    if values.get("seed") is not None:
        values["rng"] = replace(values.get("rng", Rng()), seed=values["seed"])
    cfg = RunConfig(**values, notes=translated.notes)

    # Values that are right one by one may still contradict each other or this machine's disk.
    find_contradictions(cfg, data, problems)
    directories: dict[str, Any] = {
        "checkpoint.checkpoint_dir": cfg.checkpoint.enabled and cfg.checkpoint.checkpoint_dir,
        "tensorboard.log_dir": cfg.tensorboard.enabled and cfg.tensorboard.log_dir,
    }
    for path, name in directories.items():
        if name and (wrong := check_directory(path, name)):
            problems.append(wrong)
    if not config_only and cfg.model and cfg.teacher_model and cfg.loads_teacher:
        other = find_other_tokenizer(cfg.model, cfg.teacher_model, cfg.kd_ratio > 0)
        problems += [other] if other else []
    if not config_only and cfg.model:
        missing = find_missing_template(cfg.model, cfg.dataset, [*cfg.validation_dataset.values()])
        problems += [missing] if missing else []
    if problems:
        raise ConfigError(_drop_repeats(problems, written))

    # Only a config without problems gets notes on keys that have no effect.
    cfg.notes += find_idle_keys(cfg, data) + note_on_timeout(cfg) + note_on_placement(cfg)
    cfg.notes += note_on_machines(cfg) + note_on_adapter(cfg)
    cfg.notes += filter(None, map(note_on_absent_code, _list_components(values)))
    for model in filter(None, (cfg.model, cfg.teacher_model)):
        cfg.notes += filter(None, [note_on_model(model.key, model.kwargs)])
    return cfg


def _checker_of(rules: ComponentRules) -> Callable[..., Any]:
    """Return the check of a `_target_` section."""
    if rules.has_names:
        return check_divergence
    return check_components if rules.may_be_named else check_component


def _list_components(values: dict[str, Any]) -> list[Component]:
    """Return the components among the values of a config, those of named sets too."""
    several = [value for value in values.values() if isinstance(value, dict)]
    found = [*values.values(), *(part for parts in several for part in parts.values())]
    made = [part for part in found if isinstance(part, Component)]
    return made + [part for each in made for _, part in each.parts]


#: Keys of lr_scheduler → the NeMo-AutoModel names that `translate_schedule` makes them from.
_NEMO_NAMES = {
    "num_warmup_steps": "lr_warmup_steps",
    "scheduler_specific_kwargs.min_lr": "min_lr",
    "scheduler_specific_kwargs.lr_end": "min_lr",
}


def _drop_repeats(problems: list[str], schedule: Any) -> list[str]:
    """Return one problem for each key, under the name that the YAML uses."""
    found: dict[str, str] = {}
    for line in problems:
        for ours, theirs in _NEMO_NAMES.items():
            if isinstance(schedule, dict) and theirs in schedule:
                line = line.replace(f"lr_scheduler.{ours}:", f"lr_scheduler.{theirs}:")
        found.setdefault(line.partition(": got ")[0], line)
    return [*found.values()]


#: Keys that do not change the weights of any step: they say where a run is saved and logged. The
#: number of steps is one of them too, unless the learning rate's schedule depends on it.
_WITHOUT_INFLUENCE = (
    "checkpoint.",
    "tensorboard.",
    "wandb.",
    "dist_env.",
    "validation_data",
    "recipe",
    "slurm.",
    "evaluation.",
    "teacher.directory",
    "teacher.fill",
    "teacher.window",
    "step_scheduler.val_",
    "step_scheduler.ckpt_",
)


#: Keys that decide the validation loss of given weights.
_OF_VALIDATION = (
    "validation_dataset",
    "validation_share",
    "kd_ratio",
    "kd_loss_fn",
    "loss_fn.",
    "teacher_model.",
    "teacher.",
)


def fingerprint(cfg: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the weights of each step, by name: the YAML's values with
    secrets blanked, and the versions of the libraries."""
    from importlib.metadata import version

    ignored: tuple[str, ...] = _WITHOUT_INFLUENCE
    if cfg.lr_scheduler is None or cfg.lr_scheduler.name.startswith("constant"):
        ignored = (*ignored, "step_scheduler.max_steps", "step_scheduler.num_epochs")
    flat = {name: value for name, value in _flatten(cfg).items() if not name.startswith(ignored)}
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    return flat | {"ds_kd": __version__} | versions


def list_defaults(cfg: RunConfig) -> dict[str, Any]:
    """Return the values of the keys that a YAML does not give, by dotted name.

    An argument of a `_target_` section is there if its default is the same whatever the section
    calls.
    """
    found: dict[str, Any] = {}
    for name, key in every_key():
        if key.component is not None:
            found |= {f"{name}.{part}": v for part, v in (key.component.kwargs or {}).items()}
        elif key.section is None:
            found[name] = key.default
    loss = signature_of(f"{LOSSES}KDLoss")
    if loss is not None:
        found["kd_loss_fn.temperature"] = float(loss.defaults["temperature"])
    if cfg.rolls_out:
        found["kd_ratio"] = add_defaults({"rollouts": {}})["kd_ratio"]
    return found


#: Keys by which runs differ in their results, and are compared.
_SETTINGS = (
    "model.pretrained", "teacher_model.pretrained", "kd_ratio", "kd_loss_fn.", "optimizer.",
    "lr_scheduler.", "clip_grad_norm", "rollouts.", "step_scheduler.global_batch_size",
    "step_scheduler.max_steps", "step_scheduler.num_epochs", "peft.", "rng.seed", "seed",
)  # fmt: skip


def settings_of(cfg: RunConfig) -> dict[str, Any]:
    """Return the settings by which runs are compared, secrets blanked: numbers and texts by dotted
    name."""
    flat = {name: value for name, value in _flatten(cfg).items() if name.startswith(_SETTINGS)}
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in flat.items()
    }


def fingerprint_validation(cfg: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the validation loss of given weights, by name; none for a run
    that does not validate."""
    if not cfg.validates:
        return {}
    flat = _flatten(cfg)
    return {name: value for name, value in flat.items() if name.startswith(_OF_VALIDATION)}


def _flatten(cfg: RunConfig) -> dict[str, Any]:
    """Return the YAML's values, secrets blanked, by dotted name."""
    from omegaconf import OmegaConf

    flat: dict[str, Any] = {}

    def walk(tree: Any, prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value

    walk(OmegaConf.to_container(OmegaConf.create(cfg.text)), "")
    return flat


def check_world(cfg: RunConfig, ranks: int) -> None:
    """Refuse a number of ranks that cannot be laid out, and batch sizes and copies of the weights
    that do not fit it.

    Raises:
        ConfigError: proposes a number of ranks, or a size, that fits.
    """
    width = cfg.distributed.ranks_per_sample
    if ranks % width:
        sizes = {"tp_size": cfg.distributed.tp_size, "cp_size": cfg.distributed.cp_size}
        given = {key: size for key, size in sizes.items() if (size or 1) > 1}
        told = " × ".join(f"distributed.{key} {size}" for key, size in given.items())
        most = -(-ranks // width) * width
        raise ConfigError(
            [f"{told}: got {ranks} rank(s), expected a multiple of {width}; start {most}"]
        )
    if misfit := misfit_of_batch(cfg.step_scheduler, ranks // width):
        raise ConfigError([misfit])
    for name in ("student", "teacher") if cfg.loads_teacher else ("student",):
        copies = count_copies(getattr(cfg.deepspeed, name))
        if copies < ranks and ranks % copies:
            key = f"deepspeed.{name}"
            expected = f"a zero_hpz_partition_size that divides {ranks} rank(s)"
            hint = f"write {math.gcd(copies, ranks)}, or start {copies}"
            raise ConfigError([problem(key, copies, expected, hint)])


def check_slurm_world(cfg: RunConfig) -> None:
    """Refuse a `slurm` section whose ranks cannot be laid out, as `check_world`; a config without
    one is not asked.

    Raises:
        ConfigError: says how many ranks the section starts, and proposes what fits.
    """
    if cfg.slurm is None:
        return
    nodes, each = cfg.slurm.nodes, cfg.slurm.ntasks_per_node
    try:
        check_world(cfg, nodes * each)
    except ConfigError as error:
        start = f"slurm: nodes {nodes} × ntasks_per_node {each} = {nodes * each} ranks"
        raise ConfigError([f"{start}; {line}" for line in error.problems]) from None
