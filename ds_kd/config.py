"""The config: YAML + overrides → a checked, typed `RunConfig`, and dotted names → objects.

Everything that is wrong is reported at once, before a model is loaded: the key, what was given,
what was expected, what to type next.
The schema below is the documentation: `python -m ds_kd.config` prints it as the README's table.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_kd.aliases import ALIASES, ALLOWED, REFUSED_SECTIONS, UNSUPPORTED


class ConfigError(Exception):
    """Everything that is wrong with a config, one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the config"
        super().__init__("\n".join([count, *(f"  - {line}" for line in problems)]))


def problem(key: str, given: Any, expected: str, hint: str = "") -> str:
    """One line of a `ConfigError`."""
    return f"{key}: got {given!r}, expected {expected}" + (f"; {hint}" if hint else "")


@dataclass(frozen=True)
class Target:
    """A `_target_` section: what to call, with what.

    Args:
        target: dotted name, NeMo-AutoModel's already translated.
        kwargs: its keyword arguments.
        key: where it stands in the YAML.
    """

    target: str
    kwargs: dict[str, Any]
    key: str


def key(default: Any, doc: str, kind: str, /, **bounds: Any) -> Any:
    """A documented field: `kind` is int, number, bool, str, mapping, target, section, choice or
    any."""
    meta = {"doc": doc, "kind": kind, **bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class StepScheduler:
    global_batch_size: int = key(32, "samples per optimizer step, over all ranks", "int", low=1)
    local_batch_size: int = key(1, "samples per micro-batch on one rank", "int", low=1)
    num_epochs: int = key(1, "passes over the training data", "int", low=1)
    max_steps: int | None = key(None, "stop after so many optimizer steps", "int", low=1)
    val_every_steps: int | None = key(
        None, "validate every so many optimizer steps, and after the last", "int", low=1
    )
    ckpt_every_steps: int | None = key(
        None, "checkpoint every so many optimizer steps, and after the last", "int", low=1
    )
    val_at_start: bool = key(False, "validate before the first step too", "bool")


@dataclass
class DistEnv:
    backend: str = key(
        "nccl",
        "collective library; nccl becomes gloo where there is no CUDA",
        "choice",
        among=("nccl", "gloo"),
    )
    timeout_minutes: float = key(
        10.0, "how long a collective waits for a missing rank", "number", above=0
    )


@dataclass
class Rng:
    _target_: str | None = key(None, "accepted for NeMo-AutoModel's sake", "nemo")
    seed: int = key(1111, "of shuffling, dropout and initialisation", "int", low=0)
    ranked: bool = key(True, "each rank draws its own dropout masks", "bool")


@dataclass
class Checkpoint:
    enabled: bool = key(True, "save checkpoints and resume from them", "bool")
    checkpoint_dir: str = key(
        "checkpoints/", "directory of the run; the same directory resumes", "str"
    )
    model_save_format: str = key(
        "safetensors", "format of the exported student", "choice", among=("safetensors",)
    )
    save_consolidated: str = key(
        "final", "Hugging Face student: true/final at the end, every with each checkpoint, "
        "false not at all",
        "choice", among=("false", "true", "final", "every"),
    )  # fmt: skip
    keep_last: int | None = key(None, "checkpoints that stay; all by default", "int", low=1)


@dataclass
class Distributed:
    _target_: str | None = key(None, "accepted; ZeRO-3 takes the place of FSDP2", "nemo")
    strategy: str | None = key(None, "accepted; ZeRO-3 takes the place of FSDP2", "any")
    dp_size: int | None = key(None, "data-parallel ranks; none means all there are", "int", low=1)
    dp_replicate_size: int | None = key(None, "only 1", "parallel")
    tp_size: int | None = key(None, "only 1", "parallel")
    cp_size: int | None = key(None, "only 1", "parallel")
    pp_size: int | None = key(None, "only 1", "parallel")
    ep_size: int | None = key(None, "only 1", "parallel")
    sequence_parallel: bool = key(False, "only false", "bool", among=(False,))
    activation_checkpointing: bool = key(
        False, "recompute the student's activations in backward", "bool"
    )


@dataclass
class LRScheduler:
    name: str = key("linear", "schedule by transformers' name", "choice", among=(
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ))  # fmt: skip
    num_warmup_steps: int = key(0, "optimizer steps of linear warm-up", "int", low=0)
    warmup_ratio: float | None = key(
        None,
        "warm-up as a share of all steps, in place of num_warmup_steps",
        "number",
        low=0,
        high=1,
    )
    scheduler_specific_kwargs: dict = key(dict, "further arguments of that schedule", "mapping")


@dataclass
class DeepSpeed:
    student: Any = key(
        None, "ZeRO file (path or mapping) of the student; plain ZeRO-3 by default", "any"
    )
    teacher: Any = key(
        None, "ZeRO file (path or mapping) of the teacher; plain ZeRO-3 by default", "any"
    )


@dataclass
class TensorBoard:
    enabled: bool = key(True, "write TensorBoard events", "bool")
    log_dir: str | None = key(
        None, "of events and metrics.jsonl; <checkpoint_dir>/tensorboard by default", "str"
    )


_LOADER = "torchdata.stateful_dataloader.StatefulDataLoader"
_MODEL = "transformers.AutoModelForCausalLM.from_pretrained"
_COLLATE = {"collate_fn": "ds_kd.data.collate.default_collater"}


@dataclass
class RunConfig:
    model: Target = key(
        None, "the student: from_pretrained arguments", "target", target=_MODEL, required=True
    )
    teacher_model: Target | None = key(
        None, "the teacher: likewise; not needed at kd_ratio 0", "target", target=_MODEL
    )
    dataset: Target = key(None, "training data", "target", required=True)
    kd_ratio: float = key(
        0.5, "α: 0 is pure cross-entropy, 1 pure distillation", "number", low=0, high=1
    )
    kd_loss_fn: Target = key(
        None,
        "distillation loss: temperature, ignore_index, fp32_upcast",
        "target",
        target="ds_kd.losses.KDLoss",
        default={},
    )
    loss_fn: Target = key(
        None,
        "cross-entropy: ignore_index, fp32_upcast",
        "target",
        target="ds_kd.losses.MaskedCrossEntropy",
        default={},
    )
    optimizer: Target = key(
        None,
        "an element-wise optimizer and its arguments",
        "target",
        target="torch.optim.AdamW",
        default={"lr": 1e-5},
    )
    lr_scheduler: LRScheduler | None = key(
        None, "learning-rate schedule; constant by default", "section", section=LRScheduler
    )
    clip_grad_norm: float | None = key(
        None, "largest gradient norm: a number or {max_norm: number}; off by default", "clip"
    )
    step_scheduler: StepScheduler = key(
        StepScheduler, "batch sizes and when things happen", "section", section=StepScheduler
    )
    dataloader: Target = key(
        None,
        "loader arguments: collate_fn, shuffle, drop_last, num_workers",
        "target",
        target=_LOADER,
        default=_COLLATE,
    )
    validation_dataset: Target | None = key(
        None, "validation data; without it no validation", "target"
    )
    validation_dataloader: Target = key(
        None,
        "likewise for validation; batch_size is local_batch_size by default",
        "target",
        target=_LOADER,
        default=_COLLATE,
    )
    dist_env: DistEnv = key(DistEnv, "how ranks talk", "section", section=DistEnv)
    rng: Rng = key(Rng, "random numbers", "section", section=Rng)
    seed: int | None = key(None, "newer spelling of rng.seed", "int", low=0)
    checkpoint: Checkpoint = key(Checkpoint, "what is kept", "section", section=Checkpoint)
    distributed: Distributed = key(
        Distributed, "the guide's section; only what ZeRO-3 knows", "section", section=Distributed
    )
    deepspeed: DeepSpeed = key(
        DeepSpeed, "ZeRO files of the two engines", "section", section=DeepSpeed
    )
    tensorboard: TensorBoard = key(TensorBoard, "logging", "section", section=TensorBoard)
    wandb: dict | None = key(None, "arguments of wandb.init; off by default", "mapping")
    recipe: Any = key(None, "accepted and ignored", "any")
    text: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def tensorboard_dir(self) -> str:
        return self.tensorboard.log_dir or str(Path(self.checkpoint.checkpoint_dir) / "tensorboard")


# ---- reading -------------------------------------------------------------------------------------
# -------------------


def load(
    path: str | Path, overrides: list[str] | None = None, allow: tuple[str, ...] = ()
) -> RunConfig:
    """Read, override, check.

    Args:
        path: the YAML.
        overrides: `a.b.c=value`, the value read as YAML; `null` drops a section.
        allow: prefixes of `_target_` names opened on the command line.

    Raises:
        ConfigError: everything that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        raw = OmegaConf.load(path)
        if not OmegaConf.is_dict(raw):
            raise ConfigError(
                [problem(str(path), OmegaConf.to_container(raw), "a mapping of sections")]
            )
        for override in overrides or []:
            _override(raw, override)
        data = OmegaConf.to_container(raw, resolve=True)
        text = OmegaConf.to_yaml(OmegaConf.create(_without_secrets(data)))
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"]
        ) from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from None
    assert isinstance(data, dict)
    return _check(data, text, allow)


def _override(raw: Any, override: str) -> None:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError([problem("override", override, "key.sub=value")])
    try:
        OmegaConf.update(raw, name, OmegaConf.create(f"value: {value}").value, merge=False)
    except YAMLError as error:
        raise ConfigError([f"override {override!r}: {' '.join(str(error).split())}"]) from None


def _without_secrets(tree: Any) -> Any:
    """The same tree with tokens, keys and passwords blanked: it goes into logs."""
    if isinstance(tree, dict):
        secret = re.compile(r"(?i)(^|_)(token|api_key|key|secret|password)$")
        return {
            name: "***" if value and secret.search(str(name)) else _without_secrets(value)
            for name, value in tree.items()
        }
    return [_without_secrets(value) for value in tree] if isinstance(tree, list) else tree


def _check(data: dict, text: str, allow: tuple[str, ...]) -> RunConfig:
    problems: list[str] = []
    for name in [n for n in data if n in REFUSED_SECTIONS]:
        if data.pop(name) not in (None, False):
            problems.append(f"{name}: {REFUSED_SECTIONS[name]}")
    values = _section(RunConfig, data, "", problems)
    for name, meta in _keys(RunConfig):
        if meta["kind"] == "target":
            values[name] = _target(data.get(name), name, meta, allow, problems)
    cfg = RunConfig(**values, text=text)
    _contradictions(cfg, data, problems)
    if problems:
        raise ConfigError(problems)
    if cfg.seed is not None:
        cfg.rng.seed = cfg.seed
    if cfg.checkpoint.save_consolidated == "true":
        cfg.checkpoint.save_consolidated = "final"
    for name in ("checkpoint", "tensorboard"):
        if name in data and data[name] is None:
            getattr(cfg, name).enabled = False
    if cfg.wandb is not None and cfg.wandb.pop("enabled", True) is False:
        cfg.wandb = None
    if data.get("distributed"):
        name = cfg.distributed._target_ or cfg.distributed.strategy or "section"
        cfg.notes.append(
            f"distributed: {str(name).rpartition('.')[2]} accepted; DeepSpeed ZeRO-3 takes its "
            f"place"
        )
    return cfg


def _keys(cls: Any) -> list[tuple[str, Any]]:
    return [(f.name, f.metadata) for f in dataclasses.fields(cls) if f.metadata]


def _section(cls: Any, data: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    """The checked values of `cls` in `data`; what is absent is left to its default."""
    known = dict(_keys(cls))
    values = {}
    for name, value in data.items():
        path = f"{prefix}{name}"
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known], n=1)
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
        if meta["kind"] == "target" or value is None:
            continue
        if meta["kind"] == "section":
            if not isinstance(value, dict):
                problems.append(problem(path, value, "a mapping"))
                continue
            values[name] = meta["section"](**_section(meta["section"], value, f"{path}.", problems))
        else:
            checked = _value(path, value, meta, problems)
            if checked is not None:
                values[name] = checked
    return values


def _value(path: str, value: Any, meta: Any, problems: list[str]) -> Any:
    """The value in its own type, or None after noting what is wrong."""
    kind, expected = meta["kind"], _expected(meta)
    if kind == "clip":
        value = (
            value.get("max_norm")
            if isinstance(value, dict) and set(value) <= {"max_norm"}
            else value
        )
        good = _is_number(value) and value > 0
    elif kind == "parallel":
        good = value == 1 and not isinstance(value, bool)
    elif kind == "nemo":
        good = isinstance(value, str) and value.startswith("nemo_automodel.")
    elif kind == "int":
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "number":
        good = _is_number(value)
    elif kind == "choice":
        value = str(value).lower() if isinstance(value, bool) else value
        good = value in meta["among"]
    else:
        good = isinstance(value, {"bool": bool, "str": str, "mapping": dict, "any": object}[kind])
    if good and kind in ("int", "number"):
        good = meta.get("low", value) <= value <= meta.get("high", value) and value > meta.get(
            "above", value - 1
        )
    if good and kind == "bool":
        good = value in meta.get("among", (value,))
    if not good:
        problems.append(problem(path, value, expected))
        return None
    return float(value) if kind in ("number", "clip") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
        "clip": "a number > 0 or {max_norm: number}",
        "nemo": "a name of NeMo-AutoModel, or nothing",
        "parallel": "1 (no such parallelism here)",
    }
    text = words.get(kind, kind)
    if "low" in meta and "high" in meta:
        return f"{text} from {meta['low']} to {meta['high']}"
    for name, sign in (("low", "≥"), ("above", ">"), ("high", "≤")):
        if name in meta:
            text += f" {sign} {meta[name]}"
    return text


def _target(
    value: Any, path: str, meta: Any, allow: tuple[str, ...], problems: list[str]
) -> Target | None:
    if value is None:
        if meta.get("required"):
            problems.append(f"{path}: missing; {meta['doc']}")
        return Target(meta["target"], dict(meta["default"]), path) if "default" in meta else None
    if not isinstance(value, dict):
        problems.append(problem(path, value, "a mapping with _target_"))
        return None
    kwargs = {name: inner for name, inner in value.items() if name != "_target_"}
    dotted = value.get("_target_", meta.get("target"))
    if not isinstance(dotted, str):
        problems.append(problem(f"{path}._target_", dotted, "a dotted name"))
        return None
    refusal = refuse(dotted, allow)
    if refusal:
        problems.append(f"{path}._target_: {refusal}")
    for name, inner in kwargs.items():
        if isinstance(inner, dict) and "_target_" in inner:
            problems.append(
                f"{path}.{name}: a _target_ inside a _target_ is not called; give plain values"
            )
        if name.endswith("_fn") and isinstance(inner, str) and (refusal := refuse(inner, allow)):
            problems.append(f"{path}.{name}: {refusal}")
    if meta.get("target") == _MODEL:
        _model(path, kwargs, allow, problems)
    return Target(ALIASES.get(dotted, dotted), kwargs, path)


def _model(path: str, kwargs: dict, allow: tuple[str, ...], problems: list[str]) -> None:
    name = kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or not name:
        problems.append(
            problem(f"{path}.pretrained_model_name_or_path", name, "a directory or a hub id")
        )
    for spelling in ("torch_dtype", "dtype"):
        dtype = str(kwargs.get(spelling, "auto")).removeprefix("torch.")
        if dtype not in ("bf16", "bfloat16", "fp32", "float32", "auto"):
            problems.append(
                problem(
                    f"{path}.{spelling}", dtype, "bf16, fp32 or auto", f"write {spelling}: bf16"
                )
            )
    if kwargs.get("trust_remote_code") and name not in allow:
        problems.append(
            f"{path}.trust_remote_code: runs code of the model's author; add --allow-targets "
            f"{name} to permit it"
        )


def _contradictions(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    steps = cfg.step_scheduler
    if cfg.dataloader is not None and "batch_size" in cfg.dataloader.kwargs:
        problems.append("dataloader.batch_size: set step_scheduler.local_batch_size instead")
    if steps.global_batch_size % steps.local_batch_size:
        problems.append(problem(
            "step_scheduler.global_batch_size", steps.global_batch_size,
            f"a multiple of local_batch_size {steps.local_batch_size}",
        ))  # fmt: skip
    if cfg.teacher_model is None and cfg.kd_ratio > 0 and data.get("teacher_model") is None:
        problems.append(
            "teacher_model: missing; name a teacher, or set kd_ratio: 0 for plain fine-tuning"
        )
    given = (data.get("rng") or {}).get("seed") if isinstance(data.get("rng"), dict) else None
    if cfg.seed is not None and given not in (None, cfg.seed):
        problems.append(f"seed: {cfg.seed} and rng.seed: {given} contradict each other; keep one")
    schedule = cfg.lr_scheduler
    if schedule is not None and schedule.num_warmup_steps and schedule.warmup_ratio is not None:
        problems.append("lr_scheduler: num_warmup_steps and warmup_ratio are both given; keep one")


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
    if cfg.distributed.dp_size not in (None, world_size):
        problems.append(
            problem(
                "distributed.dp_size",
                cfg.distributed.dp_size,
                f"none, or the {world_size} ranks started",
            )
        )
    if problems:
        raise ConfigError(problems)


# ---- names → objects
# ------------------------------------------------------------------------------------------------


def refuse(dotted: str, allow: tuple[str, ...] = ()) -> str:
    """Why this name may not be used, or an empty string; imports nothing."""
    name = ALIASES.get(dotted, dotted)
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", name):
        return f"{dotted!r} is not a dotted public name"
    if name in UNSUPPORTED:
        return f"{dotted}: {UNSUPPORTED[name]}"
    opened = any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in allow)
    # Of ds_kd only what a run is made of: the config's own functions would call anything.
    if name in ALLOWED or name.startswith(("ds_kd.losses.", "ds_kd.data.")) or opened:
        return ""
    if name.startswith("nemo_automodel."):
        return f"{dotted} has no counterpart in ds_kd; known: {', '.join(ALIASES)}"
    near = difflib.get_close_matches(dotted, [*ALLOWED, *ALIASES], n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"if you trust it, add --allow-targets {dotted.rpartition('.')[0]}"
    )
    return f"{dotted!r} is not among the names a config may call; {hint}"


def resolve(dotted: str, allow: tuple[str, ...] = ()) -> Any:
    """The object behind a permitted name.

    Raises:
        ConfigError: the name is refused (nothing is imported then), does not exist, or leads out of
            ds_kd.
    """
    if refusal := refuse(dotted, allow):
        raise ConfigError([refusal])
    name = ALIASES.get(dotted, dotted)
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                raise ConfigError([f"{dotted!r}: {'.'.join(parts[:split])} has no {part}"])
            found = getattr(found, part)
            if inspect.ismodule(found):  # reached through a module's own imports, not by its name
                raise ConfigError([f"{dotted!r} leads through the module {found.__name__}"])
        if name.startswith("ds_kd.") and (
            not callable(found)
            or f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}" != name
        ):
            raise ConfigError([f"{dotted!r} is not defined in ds_kd"])
        return found
    raise ConfigError([f"{dotted!r}: no such module"])


def _arguments(target: Target, allow: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: resolve(value, allow) if name.endswith("_fn") and isinstance(value, str) else value
        for name, value in target.kwargs.items()
    }


def bind(target: Target, allow: tuple[str, ...] = (), **extra: Any) -> Any:
    """The callable, after checking that it takes these arguments.

    Raises:
        ConfigError: an argument it does not know, or one that is missing.
    """
    function = resolve(target.target, allow)
    try:
        inspect.signature(function).bind(**target.kwargs, **extra)
    except TypeError as error:
        takes = ", ".join(p for p in inspect.signature(function).parameters if p not in extra)
        raise ConfigError([f"{target.key}: {error}; {target.target} takes {takes}"]) from None
    return function


def instantiate(target: Target, allow: tuple[str, ...] = (), **extra: Any) -> Any:
    """Call the target with its arguments and `extra`.

    Raises:
        ConfigError: as `bind`, or a value of a wrong type.
        ValueError: what the callable itself refuses.
    """
    function = bind(target, allow, **extra)
    try:
        return function(**_arguments(target, allow), **extra)
    except TypeError as error:
        raise ConfigError([f"{target.key}: {error}"]) from error


# ---- documentation
# --------------------------------------------------------------------------------------------------


def key_table() -> str:
    """Every key as a markdown table."""
    rows = ["| key | meaning | default |", "|---|---|---|"]
    for name, meta in _keys(RunConfig):
        section = meta.get("section")
        default = "required" if meta.get("required") else ""
        if section is None and not default:
            default = _show(meta.get("default", _default(RunConfig, name)))
        rows.append(f"| `{name}` | {meta['doc']} | {default} |")
        for inner, inner_meta in _keys(section) if section else ():
            rows.append(
                f"| `{name}.{inner}` | {inner_meta['doc']} | {_show(_default(section, inner))} |"
            )
    return "\n".join(rows)


def _default(cls: Any, name: str) -> Any:
    found = next(f for f in dataclasses.fields(cls) if f.name == name)
    return {} if found.default is dataclasses.MISSING else found.default


def _show(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return f"`{text}`"


if __name__ == "__main__":
    print(key_table())
