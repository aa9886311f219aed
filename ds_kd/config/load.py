"""YAML + overrides → a checked, typed `RunConfig`.

Everything that is wrong is reported at once, before a model is loaded: the key, what was given,
what was expected, what to type next.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_kd import __version__
from ds_kd.config.checks.combinations import find_contradictions, misfit_of_batch
from ds_kd.config.checks.components import check_component, check_components
from ds_kd.config.checks.files import check_directory, note_on_model
from ds_kd.config.checks.idle_keys import find_idle_keys
from ds_kd.config.checks.sections import check_section
from ds_kd.config.components import ConfigError
from ds_kd.config.keys import keys_of
from ds_kd.config.nemo import Translation
from ds_kd.config.schema import Rng, RunConfig
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
        allow: prefixes of `_target_` names opened on the command line.
        config_only: models need nothing but a config.json, as for a plan.

    Raises:
        ConfigError: everything that is wrong.
    """
    data, text, source = read(path, overrides or [])
    with source.locating():
        return replace(_check(data, allow, config_only), text=text, source=source)


def _check(data: dict, allow: tuple[str, ...], config_only: bool) -> RunConfig:
    """Return the typed config of a YAML's values.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    translated = Translation(data, allow)
    written, data, problems = data.get("lr_scheduler"), translated.data, translated.problems
    values = check_section(RunConfig, data, "", problems)
    for name, key in keys_of(RunConfig).items():
        if key.component is not None:
            check = check_components if key.component.may_be_named else check_component
            values[name] = check(data.get(name), key, allow, config_only, problems)
    if values.get("seed") is not None:
        values["rng"] = replace(values.get("rng", Rng()), seed=values["seed"])
    cfg = RunConfig(**values, notes=translated.notes)

    find_contradictions(cfg, data, problems)
    directories: dict[str, Any] = {
        "checkpoint.checkpoint_dir": cfg.checkpoint.enabled and cfg.checkpoint.checkpoint_dir,
        "tensorboard.log_dir": cfg.tensorboard.enabled and cfg.tensorboard.log_dir,
    }
    for path, name in directories.items():
        if name and (wrong := check_directory(path, name)):
            problems.append(wrong)
    if problems:
        raise ConfigError(_once(problems, written))

    cfg.notes += find_idle_keys(cfg, data)
    for model in filter(None, (cfg.model, cfg.teacher_model)):
        cfg.notes += filter(None, [note_on_model(model.key, model.kwargs)])
    return cfg


#: Of lr_scheduler: what `transformers_schedule` makes of NeMo-AutoModel's names.
_NEMO_NAMES = {
    "num_warmup_steps": "lr_warmup_steps",
    "scheduler_specific_kwargs.min_lr": "min_lr",
    "scheduler_specific_kwargs.lr_end": "min_lr",
}


def _once(problems: list[str], schedule: Any) -> list[str]:
    """Return each key's problem once, under the name that was written."""
    found: dict[str, str] = {}
    for line in problems:
        for ours, theirs in _NEMO_NAMES.items():
            if isinstance(schedule, dict) and theirs in schedule:
                line = line.replace(f"lr_scheduler.{ours}:", f"lr_scheduler.{theirs}:")
        found.setdefault(line.partition(": got ")[0], line)
    return [*found.values()]


#: On these the course of a run does not depend: where it is kept and shown. When it stops belongs
#: to them too, unless a schedule of the learning rate is stretched over it.
_NOT_OF_THE_COURSE = (
    "checkpoint.",
    "tensorboard.",
    "wandb.",
    "dist_env.",
    "validation_data",
    "recipe",
    "slurm.",
    "step_scheduler.val_",
    "step_scheduler.ckpt_",
)


def fingerprint(cfg: RunConfig) -> dict[str, Any]:
    """Return what decides the course of a run, by name: the YAML's own words, secrets blanked, and
    the versions of what computes."""
    from importlib.metadata import version

    from omegaconf import OmegaConf

    flat: dict[str, Any] = {}
    elsewhere: tuple[str, ...] = _NOT_OF_THE_COURSE
    if cfg.lr_scheduler is None or cfg.lr_scheduler.name.startswith("constant"):
        elsewhere = (*elsewhere, "step_scheduler.max_steps", "step_scheduler.num_epochs")

    def walk(tree: Any, prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{name}.")
            elif not f"{prefix}{name}".startswith(elsewhere):
                flat[f"{prefix}{name}"] = value

    walk(OmegaConf.to_container(OmegaConf.create(cfg.text)), "")
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    return flat | {"ds_kd": __version__} | versions


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Refuse batch sizes that do not fit the number of ranks.

    Raises:
        ConfigError: with a batch size that would.
    """
    if misfit := misfit_of_batch(cfg.step_scheduler, world_size):
        raise ConfigError([misfit])
