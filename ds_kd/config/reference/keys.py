"""The schema's keys in words: `python -m ds_kd.config.reference.keys` prints the README's table."""

from __future__ import annotations

from typing import Any

from ds_kd.config.reference.arguments import arguments_of, callables_of
from ds_kd.config.schema import RunConfig, default_of, keys_of


def every_key() -> list[tuple[str, str, str]]:
    """(key, meaning, default as YAML) of the whole schema."""
    rows = []
    for name, meta in keys_of(RunConfig):
        section = meta.get("section")
        default = "required" if meta.get("required") else ""
        if section is None and not default:
            default = _show(meta.get("default", default_of(RunConfig, name)))
        rows.append((name, meta["doc"], default))
        for inner, inner_meta in keys_of(section) if section else ():
            default = _show(default_of(section, inner))
            rows.append((f"{name}.{inner}", inner_meta["doc"], default))
    return rows


#: Units of what is counted or measured, by the last part of a key.
_UNITS = {
    "global_batch_size": "samples", "local_batch_size": "samples", "num_epochs": "epochs",
    "max_steps": "steps", "val_every_steps": "steps", "ckpt_every_steps": "steps",
    "max_skipped_steps": "steps", "timeout_minutes": "minutes", "num_warmup_steps": "steps",
    "warmup_ratio": "share of all steps", "packed_sequence_size": "tokens",
    "clip_grad_norm": "L2 norm", "keep_last": "checkpoints", "keep_best": "checkpoints",
    "dropout": "probability", "nodes": "machines", "ntasks_per_node": "ranks",
    "gpus_per_node": "accelerators", "cpus_per_task": "cores", "time": "HH:MM:SS",
    "dp_size": "ranks", "kd_ratio": "share", "every_minutes": "minutes",
}  # fmt: skip
#: What NeMo-AutoModel calls it, where the name is another; and what it has no name for.
_NEMO_NAMES = {
    "lr_scheduler.name": "lr_decay_style", "lr_scheduler.num_warmup_steps": "lr_warmup_steps",
    "lr_scheduler.scheduler_specific_kwargs": "min_lr",
}  # fmt: skip
_OWN = (
    "step_scheduler.max_skipped_steps", "step_scheduler.val_at_start", "checkpoint.keep",
    "checkpoint.every_minutes", "checkpoint.on_failed_save", "lr_scheduler.warmup_ratio",
    "deepspeed", "tensorboard",
)  # fmt: skip


def key_table() -> str:
    """Every key as a markdown table."""
    lines = ["| key | meaning | unit | default | in NeMo-AutoModel |", "|---|---|---|---|---|"]
    for name, doc, default in every_key():
        shown = default if default in ("", "required") else f"`{default}`"
        unit = _UNITS.get(name.rpartition(".")[2], "")
        nemo = "—" if name.startswith(_OWN) else _NEMO_NAMES.get(name, "same")
        lines.append(f"| `{name}` | {doc} | {unit} | {shown} | {nemo} |")
    return "\n".join(lines)


def list_keys(prefix: str = "") -> list[str]:
    """A line for each key that begins so, for a terminal."""
    rows = [row for row in every_key() if row[0].startswith(prefix)]
    rows += _arguments(prefix)
    if not rows:
        return [
            f"no key begins with {prefix}; there are: {', '.join(n for n, _ in keys_of(RunConfig))}"
        ]
    width = max(len(name) for name, _, _ in rows)
    return [
        f"{name:<{width}}  {doc}" + (f" [{default}]" if default else "")
        for name, doc, default in rows
    ]


def _arguments(prefix: str) -> list[tuple[str, str, str]]:
    """(key, whose argument it is and its type, nothing) of the `_target_` section in a prefix."""
    section = prefix.partition(".")[0]
    meta = dict(keys_of(RunConfig)).get(section, {})
    rows: dict[str, tuple[str, str, str]] = {}
    for name in callables_of(meta) if meta.get("kind") == "target" else ():
        for argument, annotation in arguments_of(name, meta)[0].items():
            key = f"{section}.{argument}"
            told = f"of {name}" + (f": {annotation}" if annotation else "")
            before = rows[key][1] + "; " if key in rows else ""
            rows[key] = (key, before + told, "")
    return [row for key, row in rows.items() if key.startswith(prefix)]


def _show(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text


if __name__ == "__main__":
    print(key_table())
