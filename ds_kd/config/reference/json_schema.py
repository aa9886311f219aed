"""The config's schema as JSON Schema: `python -m ds_kd.config.reference.json_schema`."""

from __future__ import annotations

import json
import signal
from typing import Any

from ds_kd.config.names import ALIASES
from ds_kd.config.reference.arguments import arguments_of, callables_of
from ds_kd.config.schema import RunConfig, keys_of

_TYPES: dict[str, dict[str, Any]] = {
    "int": {"type": "integer"},
    "number": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "mapping": {"type": "object"},
    "list": {"type": "array"},
    "names": {"type": ["array", "string"], "items": {"type": "string"}},
    "nemo": {"type": "string", "pattern": r"^nemo_automodel\."},
    "parallel": {"const": 1},
    "clip": {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "object", "properties": {"max_norm": {"type": "number"}}},
        ]
    },
}
_BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
#: What `load` translates before it looks: NeMo-AutoModel's spellings.
_ALSO = {
    "lr_scheduler": {"lr_decay_style": {"type": "string"}, "lr_warmup_steps": {"type": "integer"},
                     "min_lr": {"type": "number"}},
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """Of a whole YAML; null and interpolations pass everywhere, `load` judges them."""
    made = _section(RunConfig)
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "ds_kd"
    made["required"] = [name for name, meta in keys_of(RunConfig) if meta.get("required")]
    return made


def _section(cls: Any, also: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {name: _key(name, meta) for name, meta in keys_of(cls)}
    return {
        "type": "object",
        "properties": {**properties, **(also or {})},
        "additionalProperties": False,
    }


def _key(name: str, meta: Any) -> dict[str, Any]:
    kind = meta["kind"]
    if kind == "section":
        wanted = [_section(meta["section"], _ALSO.get(name))]
        wanted += [{"type": "boolean"}] if name == "compile" else []
    elif kind == "target":
        wanted = [_target(meta)]
    elif kind == "choice":
        among = [*meta["among"], *(word == "true" for word in meta["among"] if word in _TRUTH)]
        wanted = [{"enum": among}]
    elif kind == "any":
        return {"description": meta["doc"]}
    else:
        wanted = [{**_TYPES[kind], **{_BOUNDS[n]: meta[n] for n in _BOUNDS if n in meta}}]
    loose = [{"type": "null"}, {"type": "string", "pattern": r"^\$\{"}]
    loose += [{"const": "none"}] if name.endswith("_size") else []
    return {"description": meta["doc"], "anyOf": [*wanted, *loose]}


def _target(meta: Any) -> dict[str, Any]:
    """A `_target_` section: the arguments of each callable that the project knows for it."""
    properties: dict[str, Any] = {"_target_": {"type": "string"}}
    made: dict[str, Any] = {"type": "object", "properties": properties}
    cases = []
    for name in callables_of(meta):
        taken, is_open = arguments_of(name, meta)
        arguments = {argument: _typed(annotation) for argument, annotation in taken.items()}
        spellings = [name, *(other for other, ours in ALIASES.items() if ours == name)]
        chosen: dict[str, Any] = {"properties": {"_target_": {"enum": spellings}}}
        if name != meta.get("target"):
            chosen["required"] = ["_target_"]
        then: dict[str, Any] = {"properties": {"_target_": True, **arguments}}
        if not is_open:
            then["additionalProperties"] = False
        cases.append({"if": chosen, "then": then})
        for argument, schema in arguments.items():
            known = properties.setdefault(argument, schema)
            properties[argument] = known if known == schema else {}  # each case has its own
    return {**made, "allOf": cases} if cases else made


_PLAIN = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


def _typed(annotation: str) -> dict[str, Any]:
    """The schema of a plain annotation; anything goes for another."""
    names = [name.strip() for name in annotation.split("|")]
    if not annotation or not set(names) <= {*_PLAIN, "None"}:
        return {}
    kinds = [{"type": _PLAIN[name]} for name in names if name != "None"]
    if "float" in names:  # 1e-8 is a text to YAML 1.1 and a number to `load`
        kinds.append({"type": "string", "pattern": r"^[-+]?[\d.]+[eE][-+]?\d+$"})
    return {"anyOf": [*kinds, {"type": "null"}, {"type": "string", "pattern": r"^\$\{"}]}


_TRUTH = ("true", "false")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends without a word
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
