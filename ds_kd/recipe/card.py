"""Write the model card of a run's student: what it is, what it was made from, and how."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from ds_kd.checkpoint.state import TrainState
from ds_kd.config.checks.files import is_directory, looks_local
from ds_kd.config.components import Component
from ds_kd.config.load import fingerprint
from ds_kd.config.losses import is_of_layers
from ds_kd.config.schema import SHARED_BASE, RunConfig
from ds_kd.config.text.secrets import blank_secrets
from ds_kd.errors import UserError
from ds_kd.evaluate.comparison import SHOWN, read_lines
from ds_kd.recipe.models import name_of, training_dtype
from ds_kd.recipe.offline.record import read_record
from ds_kd.recipe.results import log_of

_BODY = """
# {student}, distilled from {teacher}

{summary}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "."  # this directory, or its name on the hub
student = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)
```

With ds_kd: `print(ds_kd.load_student(here)("a prompt").text)`.

## Training

| | |
|---|---|
{training}

## Validation

{validation}

## Licence

To fill in, here and as `license` at the top: the terms of the student that this one started from,
of the teacher and of the data all apply.

## Made by

{made_by}

<details><summary>The YAML with its overrides, secrets blanked</summary>

````yaml
{yaml}
````

</details>
"""
#: The name of a running script → how a user starts it.
_STARTS = {
    "kd.py": ["python", "launch/kd.py"],
    "ds-kd": ["ds-kd"],
    "ds_kd": ["python", "-m", "ds_kd"],
}


def write_card(cfg: RunConfig, ranks: int, state: TrainState) -> str:
    """Return the card (`README.md`) of the student at a step: Markdown below the metadata that the
    Hugging Face hub reads.

    Args:
        ranks: number of ranks of the run.
        state: the counters at that step; validations of later steps are left out.
    """
    student = _name_short(cfg.model)
    named = _find_teacher(cfg)
    teacher = "its data" if named is None else _shorten(named)
    teacher = student if cfg.teacher.kind == SHARED_BASE else teacher
    training = _describe_training(cfg, ranks, state)
    body = _BODY.format(
        student=student,
        teacher=teacher,
        summary=_summarize(cfg, state, student, teacher),
        training="\n".join(f"| {name} | {_escape(value)} |" for name, value in training.items()),
        validation="\n".join(_tabulate_validation(cfg, state.step)),
        made_by=_describe_command(),
        yaml=cfg.text.strip(),
    )
    return f"---\n{_write_metadata(cfg)}\n---\n{body}"


def _write_metadata(cfg: RunConfig) -> str:
    """Return the YAML at the top; models and data are named that are on the hub."""
    from huggingface_hub import ModelCardData

    sets = [cfg.dataset.kwargs.get(name) for name in ("path_or_dataset_id", "dataset_name")]
    data = ModelCardData(
        base_model=name_of(cfg.model) if _is_on_hub(name_of(cfg.model)) else None,
        datasets=[name for name in sets if isinstance(name, str) and _is_on_hub(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "ds_kd", "deepspeed"],
        license="unknown",
    )
    return data.to_yaml().replace("license: unknown", "license: unknown  # fill in").strip()


def _is_on_hub(name: str) -> bool:
    return "/" in name and not is_directory(name) and not looks_local(name)


def _find_teacher(cfg: RunConfig) -> str | None:
    """Return the directory or hub id of the teacher, also of one that only a cache knows."""
    if cfg.teacher_model is not None:
        return name_of(cfg.teacher_model)
    found = read_record(Path(cfg.teacher.directory or "")) if cfg.reads_cache else None
    return None if found is None else found.teacher


def _name_short(model: Component) -> str:
    return _shorten(name_of(model))


def _shorten(name: str) -> str:
    """Return a hub id, or the last part of a path."""
    return name if _is_on_hub(name) else Path(name).name or name


def _summarize(cfg: RunConfig, state: TrainState, student: str, teacher: str) -> str:
    how = f"A small student of `{teacher}`: `{student}`, trained on the data and on the"
    if cfg.kd_ratio == 1:
        how = f"A small student of `{teacher}`: `{student}`, trained on the"
    how += " teacher's whole next-token distribution"
    if cfg.kd_ratio == 0:
        how = f"`{student}`, fine-tuned on the data alone"
    return f"{how}, for {state.step:,} steps, by ds_kd (knowledge distillation on DeepSpeed)."


def _describe_training(cfg: RunConfig, ranks: int, state: TrainState) -> dict[str, Any]:
    """Return what the student was made from and how, by name."""
    told: dict[str, Any] = {"started from": name_of(cfg.model)}
    if (teacher := _find_teacher(cfg)) is not None and cfg.kd_ratio > 0:
        told["teacher"] = teacher
    elif cfg.teacher.kind == SHARED_BASE and cfg.kd_ratio > 0:
        frozen = cfg.teacher.adapter
        under = "without the adapter" if frozen is None else f"under the adapter {frozen}"
        told["teacher"] = f"the model it started from, {under}"
    if cfg.peft is not None:
        told["adapter, merged"] = f"LoRA, rank {cfg.peft.dim}, alpha {cfg.peft.alpha}"

    # The settings that others would have to repeat, in the words of the YAML.
    pack = cfg.packed_sequence.packed_sequence_size
    batch = str(cfg.step_scheduler.global_batch_size)
    names = ("ds_kd", "torch", "transformers", "deepspeed")
    versions = [f"{name} {version}" for name, version in fingerprint(cfg).items() if name in names]
    return told | {
        "data": _describe(cfg.dataset),
        "loss": _describe_loss(cfg),
        "optimizer": _describe(cfg.optimizer),
        "learning rate's schedule": _describe_schedule(cfg),
        "clip_grad_norm": "none" if cfg.clip_grad_norm is None else cfg.clip_grad_norm,
        "global_batch_size": f"{batch} packs of {pack} tokens" if pack else batch,
        "steps": f"{state.step:,}",
        "tokens": f"{state.tokens:,}, of which {state.labels:,} supervised",
        "precision": str(training_dtype(cfg.model)).removeprefix("torch."),
        "seed": cfg.rng.seed,
        "ranks": ranks,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _describe_schedule(cfg: RunConfig) -> str:
    schedule = cfg.lr_scheduler
    if schedule is None:
        return "constant"
    if schedule.warmup_ratio is not None:
        return f"{schedule.name}, warm-up over {schedule.warmup_ratio:.0%} of the steps"
    return f"{schedule.name}, {schedule.num_warmup_steps} steps of warm-up"


_OF_EVERY_LOSS = ("temperature", "ignore_index", "fp32_upcast", "chunk_size")


def _describe_loss(cfg: RunConfig) -> str:
    """Return the loss as a formula with its numbers."""
    if cfg.kd_ratio == 0:
        return "CE"
    told = []
    for loss in cfg.kd_losses:
        others = {n: v for n, v in loss.kwargs.items() if n not in _OF_EVERY_LOSS}
        arguments = ", ".join(f"{name} {value}" for name, value in blank_secrets(others).items())
        name = loss.name.rpartition(".")[2] + (f" ({arguments})" if arguments else "")
        heat = f", temperature {float(loss.kwargs.get('temperature', 1.0)):g}"
        told.append(name if is_of_layers(loss) else name + heat)
    if cfg.kd_loss_fn.parts:
        weights = (weight for weight, _ in cfg.kd_loss_fn.parts)
        told = [f"{w:g} · {part}" for w, part in zip(weights, told, strict=True)]
        told = [f"({' + '.join(told)})"]
    return f"{1 - cfg.kd_ratio:g} · CE + {cfg.kd_ratio:g} · {told[0]}"


def _describe(component: Component) -> str:
    """Return the name of a section's callable and its arguments, secrets blanked."""
    values = blank_secrets(dict(component.kwargs))
    return f"{component.name}({', '.join(f'{name}={value}' for name, value in values.items())})"


def _escape(value: Any) -> str:
    """Return a value as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _tabulate_validation(cfg: RunConfig, step: int) -> list[str]:
    """Return a table of the first and the last validation up to a step, from the run's log."""
    try:
        records = read_lines(log_of(cfg))
    except (UserError, UnicodeDecodeError):  # no log, or a damaged one: the student counts more
        records = []
    found = [each for each in records if "val_loss" in each and each.get("step", 0) <= step]
    if not found:
        return ["The run did not validate."]
    shown = [found[0], *([found[-1]] if found[-1] is not found[0] else [])]
    heads = [f"after step {each['step']}" if each["step"] else "before" for each in shown]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(shown)) + "|"]
    for key, label in SHOWN:
        if all(key in each for each in shown):
            lines.append(f"| {label} | {' | '.join(f'{each[key]:.4f}' for each in shown)} |")
    return lines


def _describe_command() -> str:
    """Return the command of this process, secrets blanked, as a Markdown paragraph."""
    script, *words = sys.argv or [""]
    path = Path(script)
    # A module's script is `…/ds_kd/__main__.py`.
    start = _STARTS.get(path.parent.name if path.name == "__main__.py" else path.name)
    if start is None:
        return "`ds_kd.build(ds_kd.load_config(…)).train()` from Python, with the YAML below."
    # The deepspeed launcher adds a word of its own.
    words = [word for word in words if not word.startswith("--local_rank")]
    return f"```bash\n{shlex.join([*start, *blank_secrets(words)])}\n```"
