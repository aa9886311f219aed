"""Sections of NeMo-AutoModel's recipes that change no result here: taken out, each with a note.

What would change a result (another parallelism, fp8, quantised weights) stays in and is refused.
"""

from __future__ import annotations

from typing import Any

from ds_kd.config.names import ALIASES, NEMO_COLLATERS, NEMO_KERNELS, NEMO_LOSSES, WITHOUT_EFFECT

_COLLATER = "ds_kd.data.collate.default_collater"
#: Of a data set's section: how rows are padded in advance, shuffled in advance, or read.
_OF_DATA = {
    "padding": "the collater pads each batch",
    "shuffle_seed": "rows are shuffled with rng.seed",
    "num_proc": "rows are read as the machine has cores",
}


def translate(data: dict[str, Any]) -> list[str]:
    """Take what changes no result out of `data`, in place.

    Returns:
        A note for each.
    """
    notes = [_drop(data, path, reason) for path, reason in WITHOUT_EFFECT.items()]
    for name in ("model", "teacher_model"):
        for key in NEMO_KERNELS:
            notes.append(_drop(data, f"{name}.{key}", "it changes speed alone, not results"))
    for name in ("dataloader", "validation_dataloader"):
        notes += _collater(data.get(name), f"{name}.collate_fn")
    for name in ("dataset", "validation_dataset"):
        notes += _rows(data, name)
    notes.append(_loss(data.get("loss_fn")))
    section = data.get("checkpoint")
    if isinstance(section, dict) and section.get("model_save_format") == "torch_save":
        del section["model_save_format"]
        notes.append("checkpoint.model_save_format: accepted; the student is saved as safetensors")
    section = data.get("compile")
    if isinstance(section, dict):
        for key in [key for key, value in section.items() if value is None]:
            del section[key]
    return [note for note in notes if note]


def _drop(data: dict[str, Any], path: str, reason: str) -> str:
    """Remove a key; the note, or nothing where it is not there."""
    *way, name = path.split(".")
    section: Any = data
    for part in way:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or name not in section:
        return ""
    value = section.pop(name)
    return "" if value is None or value is False else f"{path}: accepted; {reason}"


def _collater(loader: Any, key: str) -> list[str]:
    """`collate_fn: {_target_: …}` of a known collater, as its name alone."""
    given = loader.get("collate_fn") if isinstance(loader, dict) else None
    name = given.get("_target_") if isinstance(given, dict) else given
    if not isinstance(name, str):
        return []
    if name in NEMO_COLLATERS:
        loader["collate_fn"] = _COLLATER
        return [f"{key}: accepted; default_collater takes its place, which lays packs end to end"]
    if not isinstance(given, dict) or ALIASES.get(name, name) != _COLLATER:
        return []
    loader["collate_fn"] = _COLLATER
    more = sorted(set(given) - {"_target_"})
    return [f"{key}.{part}: accepted; padding changes no result" for part in more]


def _rows(data: dict[str, Any], name: str) -> list[str]:
    """What a data set's section says of padding, shuffling and the student's own tokenizer."""
    section, notes = data.get(name), []
    if not isinstance(section, dict):
        return []
    if str(section.get("_target_", "")).endswith(".ChatDataset"):
        notes = [_drop(data, f"{name}.{key}", reason) for key, reason in _OF_DATA.items()]
    tokenizer, model = section.get("tokenizer"), data.get("model")
    key = "pretrained_model_name_or_path"
    names = [part.get(key) if isinstance(part, dict) else None for part in (tokenizer, model)]
    if names[0] is not None and names[0] == names[1]:
        del section["tokenizer"]
        notes.append(f"{name}.tokenizer: accepted; it is the student's own")
    return notes


def _loss(section: Any) -> str:
    """A fused or chunked cross-entropy, as this project's own, which never holds whole logits."""
    name = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in NEMO_LOSSES:
        return ""
    section["_target_"] = "ds_kd.losses.MaskedCrossEntropy"
    for argument in NEMO_LOSSES[name]:
        section.pop(argument, None)
    if not section.get("logit_softcapping", True):
        del section["logit_softcapping"]
    return f"loss_fn: {str(name).rpartition('.')[2]} accepted; MaskedCrossEntropy takes its place"
