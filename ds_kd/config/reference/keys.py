"""List the keys: `python -m ds_kd.config.reference.keys` prints the table of docs/config.md."""

from __future__ import annotations

import difflib
from typing import Any

from ds_kd.config.keys import Key, keys_of
from ds_kd.config.reference.arguments import arguments_of, callables_of
from ds_kd.config.schema import RunConfig
from ds_kd.config.signatures import divergences_by_name, signature_of


def every_key() -> list[tuple[str, Key]]:
    """Return (whole name, key) of the whole schema, each section before its own keys."""
    rows = []
    for name, key in keys_of(RunConfig).items():
        rows.append((name, key))
        inner = keys_of(key.section) if key.section else {}
        rows += [(f"{name}.{part}", inner[part]) for part in inner]
    return rows


def default_of(key: Key) -> str:
    """Return a key's default as YAML: empty for a section, `required` where there is none."""
    if key.section is not None:
        return ""
    if key.component is None:
        return _show(key.default)
    if key.component.required:
        return "required"
    return _show(None if key.component.kwargs is None else dict(key.component.kwargs))


#: Keys that NeMo-AutoModel names differently, and keys and whole sections that it does not have.
_NEMO_NAMES = {
    "lr_scheduler.name": "lr_decay_style", "lr_scheduler.num_warmup_steps": "lr_warmup_steps",
    "lr_scheduler.scheduler_specific_kwargs": "min_lr",
}  # fmt: skip
_OWN = {
    "validation_share", "packed_sequence.share_prefixes", "lr_scheduler.warmup_ratio",
    "step_scheduler.patience", "step_scheduler.max_skipped_steps", "step_scheduler.val_at_start",
    "step_scheduler.val_samples", "step_scheduler.validate_teacher", "checkpoint.every_minutes",
    "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.on_failed_save",
    "slurm.cpus_per_task", "slurm.log_dir", "slurm.container_mounts", "slurm.sbatch_options",
}  # fmt: skip
_OWN_SECTIONS = {"teacher", "rollouts", "evaluation", "deepspeed", "tensorboard"}


def key_table() -> str:
    """Return every key as a markdown table."""
    lines = ["| key | meaning | unit | default | in NeMo-AutoModel |", "|---|---|---|---|---|"]
    for name, key in every_key():
        default = default_of(key)
        shown = default if default in ("", "required") else f"`{default}`"
        is_own = name in _OWN or name.partition(".")[0] in _OWN_SECTIONS
        nemo = "—" if is_own else _NEMO_NAMES.get(name, "same")
        lines.append(f"| `{name}` | {key.sentence} | {key.unit} | {shown} | {nemo} |")
    return "\n".join(lines)


def list_keys(prefix: str = "") -> list[str]:
    """Return a line for each key that begins with `prefix`, for a terminal."""
    rows = [(name, key.sentence, _describe_value(key)) for name, key in every_key()]
    rows = [row for row in rows if row[0].startswith(prefix)] + _list_arguments(prefix)
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"{name:<{width}}  {sentence}{more}" for name, sentence, more in rows]


def hint_at_keys(prefix: str) -> str:
    """Return what to say where no key begins with `prefix`."""
    names = [name for name, _ in every_key()]
    near = difflib.get_close_matches(prefix, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(keys_of(RunConfig))}"
    return f"--list-keys: no key begins with {prefix}; {hint}"


def _describe_value(key: Key) -> str:
    told = [key.unit, f"default {default_of(key)}" if default_of(key) else ""]
    told = ["required"] if default_of(key) == "required" else [part for part in told if part]
    return f" [{', '.join(told)}]" if told else ""


def _list_arguments(prefix: str) -> list[tuple[str, str, str]]:
    """Return (key, its sentence, its callables and annotations) for each argument of a section."""
    section = prefix.partition(".")[0]
    key = keys_of(RunConfig).get(section)
    if key is None or key.component is None:
        return []
    rows: dict[str, list[str]] = {}
    sentences: dict[str, str] = {}
    words = {dotted: name for name, dotted in divergences_by_name().items()}
    if key.component.has_names:
        rows[f"{section}.name"] = [f"one of {', '.join(words.values())}"]
        sentences[f"{section}.name"] = "Chooses one of the project's, in place of _target_ "

    # Arguments of all the project's divergences are told of the default one only.
    shared = arguments_of(key.component.calls, key.component)[0] if key.component.calls else {}
    for name in callables_of(key.component):
        is_other = name in words and name != key.component.calls
        for argument, annotation in arguments_of(name, key.component)[0].items():
            if is_other and argument in shared:
                continue
            path = f"{section}.{argument}"
            sentence, told = _describe_argument(name, argument, annotation)
            if is_other:  # one argument may mean another thing in each, so each tells its own
                told = f"of {words[name]}{told.removeprefix(f'of {name}')}"
                told, sentence = f"{told} ({sentence.strip().rstrip('.')})", ""
            rows.setdefault(path, []).append(told)
            sentences[path] = sentences.get(path) or sentence
    return [
        (path, sentences[path], f"[{'; '.join(told)}]")
        for path, told in rows.items()
        if path.startswith(prefix)
    ]


def _describe_argument(name: str, argument: str, annotation: str) -> tuple[str, str]:
    """Return the sentence on an argument of a callable, and its callable, annotation and default.

    The sentence is that of the docstring if the callable is one of the project.
    """
    signature = signature_of(name)
    assert signature is not None
    told = f"of {name}" + (f": {annotation}" if annotation else "")
    if argument in signature.defaults:
        told += f" = {signature.defaults[argument]}"

    # A text that refers to another function says nothing here.
    text = signature.sentences.get(argument, "") if name.startswith("ds_kd.") else ""
    is_empty = not text or text.startswith(("see ", "as for "))
    return "" if is_empty else f"{text[0].upper()}{text[1:]} ", told


def _show(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text


if __name__ == "__main__":
    print(key_table())
