"""YAML + overrides → a checked, typed `RunConfig`.

Everything that is wrong is reported at once, before a model is loaded: the key, what was given,
what was expected, what to type next.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from ds_kd import __version__
from ds_kd.config.checks.combinations import find_contradictions, is_number
from ds_kd.config.checks.components import check_target
from ds_kd.config.checks.files import check_directory, note_on_model
from ds_kd.config.checks.idle_keys import find_idle_keys
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.names import REFUSED_KEYS, transformers_schedule
from ds_kd.config.nemo import translate
from ds_kd.config.origins import decoded
from ds_kd.config.schema import RunConfig, default_of, keys_of
from ds_kd.config.yaml_source import read


def load(
    path: str | Path | dict[str, Any],
    overrides: list[str] | None = None,
    allow: tuple[str, ...] = (),
    config_only: bool = False,
) -> RunConfig:
    """Read, override, check.

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
        cfg = _check(data, text, allow, config_only)
    cfg.source = source
    return cfg


def _check(data: dict, text: str, allow: tuple[str, ...], config_only: bool) -> RunConfig:
    problems: list[str] = []
    schedule = data.get("lr_scheduler")
    if isinstance(schedule, dict):
        data["lr_scheduler"] = transformers_schedule(decoded(schedule), problems)
    if isinstance(data.get("compile"), bool):
        data["compile"] = {"enabled": data["compile"]}
    notes = translate(data)
    values = _section(RunConfig, data, "", problems)
    for name, meta in keys_of(RunConfig):
        if meta["kind"] == "target":
            meta = {**meta, "config_only": config_only}
            values[name] = check_target(data.get(name), name, meta, allow, problems)
    cfg = RunConfig(**values, text=text, notes=notes)
    find_contradictions(cfg, data, problems)
    for path, name in _written(cfg, data).items():
        if wrong := check_directory(path, name):
            problems.append(wrong)
    if problems:
        raise ConfigError(_once(problems, schedule))
    cfg.notes += find_idle_keys(cfg, data)
    for model in filter(None, (cfg.model, cfg.teacher_model)):
        cfg.notes += filter(None, [note_on_model(model.key, model.kwargs)])
    if cfg.seed is not None:
        cfg.rng.seed = cfg.seed
    if cfg.checkpoint.save_consolidated == "true":
        cfg.checkpoint.save_consolidated = "final"
    for name in ("checkpoint", "tensorboard"):
        if name in data and data[name] is None:
            getattr(cfg, name).enabled = False
    if cfg.wandb is not None and cfg.wandb.pop("enabled", True) is False:
        cfg.wandb = None
    if cfg.wandb is not None and "save_dir" in cfg.wandb:  # NeMo-AutoModel's word
        cfg.wandb["dir"] = cfg.wandb.pop("save_dir")
    if cfg.peft is not None and cfg.peft.use_triton:
        cfg.notes.append("peft.use_triton: accepted; peft's PyTorch code takes its place")
    if data.get("distributed"):
        name = cfg.distributed._target_ or cfg.distributed.strategy or "section"
        cfg.notes.append(
            f"distributed: {str(name).rpartition('.')[2]} accepted; DeepSpeed ZeRO-3 takes its "
            f"place"
        )
    if cfg.distributed.dp_size is not None:
        cfg.notes.append("distributed.dp_size: accepted; all ranks that are started share the data")
    return cfg


def _written(cfg: RunConfig, data: dict) -> dict[str, str]:
    """The directories that a run writes, by key."""
    named = {
        "checkpoint.checkpoint_dir": cfg.checkpoint.enabled and cfg.checkpoint.checkpoint_dir,
        "tensorboard.log_dir": cfg.tensorboard.enabled and cfg.tensorboard.log_dir,
    }
    absent = {name for name in data if data[name] is None}
    return {n: path for n, path in named.items() if path and n.partition(".")[0] not in absent}


#: Of lr_scheduler: what `transformers_schedule` makes of NeMo-AutoModel's names.
_NEMO_NAMES = {
    "num_warmup_steps": "lr_warmup_steps",
    "scheduler_specific_kwargs.min_lr": "min_lr",
    "scheduler_specific_kwargs.lr_end": "min_lr",
}


def _once(problems: list[str], schedule: Any) -> list[str]:
    """Each key's problem once, under the name that was written."""
    found: dict[str, str] = {}
    for line in problems:
        for ours, theirs in _NEMO_NAMES.items():
            if isinstance(schedule, dict) and theirs in schedule:
                line = line.replace(f"lr_scheduler.{ours}:", f"lr_scheduler.{theirs}:")
        found.setdefault(line.partition(": got ")[0], line)
    return [*found.values()]


def _section(cls: Any, data: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    """The checked values of `cls` in `data`; what is absent is left to its default."""
    known = dict(keys_of(cls))
    values = {}
    for name, value in data.items():
        path = f"{prefix}{name}"
        if path in REFUSED_KEYS:
            if not _is_off(value):
                problems.append(f"{path}: {REFUSED_KEYS[path]}")
            continue
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known], n=1, cutoff=0.75)
            hint = (
                f"; did you mean {prefix}{near[0]}?"
                if near
                else f"; known here: {', '.join(known)}"
            )
            problems.append(f"{path}: unknown key{hint}")
            continue
        meta = known[name]
        if isinstance(value, str) and value.lower() == "none" and prefix == "distributed.":
            value = None
        has_default = default_of(cls, name) is not None or "default" in meta
        if value is None and has_default and meta["kind"] not in ("section", "names", "target"):
            problems.append(
                problem(path, None, _expected(meta), "leave the key out for its default")
            )
        if meta["kind"] == "target" or value is None:
            continue
        if meta["kind"] == "section":
            if not isinstance(value, dict):
                first = next(n for n, _ in keys_of(meta["section"]) if n != "_target_")
                problems.append(problem(path, value, f"a mapping such as {{{first}: …}}"))
                continue
            values[name] = meta["section"](**_section(meta["section"], value, f"{path}.", problems))
        else:
            checked = _value(path, value, meta, problems)
            if checked is not None:
                values[name] = checked
    return values


_KINDS = {"bool": bool, "str": str, "mapping": dict, "list": list, "any": object}


def _value(path: str, value: Any, meta: Any, problems: list[str]) -> Any:
    """The value in its own type, or None after noting what is wrong."""
    kind, expected = meta["kind"], _expected(meta)
    # Where text is meant, that of a variable stays one.
    value = value if kind in ("str", "names", "mapping") else decoded(value)
    if kind == "clip":
        value = (
            value.get("max_norm")
            if isinstance(value, dict) and set(value) <= {"max_norm"}
            else value
        )
        good = is_number(value) and value > 0
    elif kind == "parallel":
        good = value == 1 and not isinstance(value, bool)
    elif kind == "nemo":
        good = isinstance(value, str) and value.startswith("nemo_automodel.")
    elif kind == "names":
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    elif kind == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "number":
        good = is_number(value)
    elif kind == "choice":
        value = str(value).lower() if isinstance(value, bool) else value
        good = value in meta["among"]
    else:
        good = isinstance(value, _KINDS[kind])
    if good and kind in ("int", "number"):
        good = meta.get("low", value) <= value <= meta.get("high", value) and value > meta.get(
            "above", value - 1
        )
    if good and kind == "bool":
        good = value in meta.get("among", (value,))
    if not good:
        problems.append(problem(path, value, expected, _quotes(kind, value)))
        return None
    return float(value) if kind in ("number", "clip") else value


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False
    return value is None or value is False


def _quotes(kind: str, value: Any) -> str:
    """A hint where quotes are what is wrong."""
    if kind == "str" and isinstance(value, (int, float)):
        return "put it in quotes"
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value)
    return "write it without quotes" if kind in ("int", "number") and is_number else ""


def _expected(meta: Any) -> str:
    kind = meta["kind"]
    if "among" in meta:
        return " or ".join(str(choice).lower() for choice in meta["among"])
    words = {
        "int": "an integer",
        "number": "a number",
        "bool": "true or false",
        "str": "text",
        "mapping": "a mapping",
        "list": "a list",
        "names": "a list of names",
        "target": "a mapping with _target_",
        "clip": "a number > 0 or {max_norm: number}, or nothing for no clipping",
        "nemo": "a name of NeMo-AutoModel, or nothing",
        "parallel": "1 (no such parallelism here)",
    }
    text = words.get(kind, kind)
    if "low" in meta and "high" in meta:
        return f"{text} from {meta['low']} to {meta['high']}"
    bounds = (("low", "≥"), ("above", ">"), ("high", "≤"))
    return " ".join(
        [text, " and ".join(f"{sign} {meta[name]}" for name, sign in bounds if name in meta)]
    ).strip()


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
    """What decides the course of a run, by name: the YAML's own words, secrets blanked, and the
    versions of what computes."""
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
    steps, problems = cfg.step_scheduler, []
    width = steps.local_batch_size * world_size
    if steps.global_batch_size % width:
        up = -(-steps.global_batch_size // width) * width
        problems.append(problem(
            "step_scheduler.global_batch_size", steps.global_batch_size,
            f"a multiple of local_batch_size {steps.local_batch_size} × {world_size} ranks = "
            f"{width}", f"write {up}",
        ))  # fmt: skip
    if problems:
        raise ConfigError(problems)
