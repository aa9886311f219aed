"""The config's schema as JSON Schema: `python -m ds_kd.config.reference.json_schema`."""

from __future__ import annotations

import json
import signal
from typing import Any

from ds_kd.config.keys import ComponentRules, Key, keys_of
from ds_kd.config.names import ALIASES, WITHOUT_EFFECT
from ds_kd.config.reference.arguments import arguments_of, callables_of
from ds_kd.config.schema import RunConfig

_BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum"}
#: Keys that `load` translates before it looks: NeMo-AutoModel's spellings.
_SPELLINGS: dict[str, dict[str, Any]] = {
    "lr_scheduler.lr_decay_style": {"type": "string"},
    "lr_scheduler.lr_warmup_steps": {"type": "integer"},
    "lr_scheduler.min_lr": {"type": "number"},
    **{path: {"description": f"Accepted; {why}."} for path, why in WITHOUT_EFFECT.items()},
}
_NAMED = "NeMo-AutoModel's spelling of a named set."


def json_schema() -> dict[str, Any]:
    """Return the schema of a whole YAML. Null and `${…}` are accepted everywhere."""
    made = _describe_section(RunConfig, "")
    made["patternProperties"] = {
        "^_": {"description": "Not read."},
        **{
            rf"^{name}_\w+$": {**_describe_component(key.component), "description": _NAMED}
            for name, key in keys_of(RunConfig).items()
            if key.component and key.component.may_be_named
        },
    }
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "ds_kd"
    made["required"] = [
        name for name, key in keys_of(RunConfig).items() if key.component and key.component.required
    ]
    return made


def _describe_section(cls: Any, name: str) -> dict[str, Any]:
    """Return the schema of a section with its other spellings; the root has an empty name."""
    properties = {key: _describe_key(value) for key, value in keys_of(cls).items()}
    for path, schema in _SPELLINGS.items():
        section, _, key = path.rpartition(".")
        if section == name:
            properties[key] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _describe_key(key: Key) -> dict[str, Any]:
    if key.section is not None:
        wanted = [_describe_section(key.section, key.name)]
        wanted += [{"type": "boolean"}] if key.name == "compile" else []
    elif key.component is not None:
        wanted = [_describe_component(key.component)]
        if key.component.may_be_named:
            part = {"anyOf": [_describe_component(key.component), {"type": "null"}]}
            several = {"type": "object", "minProperties": 1, "not": {"required": ["_target_"]}}
            named = {"patternProperties": {r"^\w+$": part}, "additionalProperties": False}
            wanted.append({**several, **named})
    elif not key.kind.json:
        return {"description": key.sentence}
    else:
        wanted = [{**key.kind.json, **{_BOUNDS[name]: key.bounds[name] for name in key.bounds}}]
    loose: list[dict[str, Any]] = [{"type": "null"}, {"type": "string", "pattern": r"^\$\{"}]
    loose += [{"const": "none"}] if key.name.endswith("_size") else []
    return {"description": key.sentence, "anyOf": [*wanted, *loose]}


def _describe_component(rules: ComponentRules) -> dict[str, Any]:
    """Return the schema of a `_target_` section, with a case for each callable that it may name."""
    properties: dict[str, Any] = {"_target_": {"type": "string"}}
    made: dict[str, Any] = {"type": "object", "properties": properties}
    if not rules.calls:
        made["required"] = ["_target_"]

    # Each callable is one `if`/`then`: with this name, these arguments.
    cases = []
    for name in callables_of(rules):
        taken, is_open = arguments_of(name, rules)
        arguments = {
            argument: _describe_annotation(annotation) for argument, annotation in taken.items()
        }
        if "tokenizer" in rules.given:
            arguments["tokenizer"] = {"description": "Accepted where it is the student's own."}
        spellings = [name, *(other for other, ours in ALIASES.items() if ours == name)]
        chosen: dict[str, Any] = {"properties": {"_target_": {"enum": spellings}}}
        if name != rules.calls:
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


def _describe_annotation(annotation: str) -> dict[str, Any]:
    """Return the schema of a plain annotation; any value is accepted for another."""
    names = [name.strip() for name in annotation.split("|")]
    if not annotation or not set(names) <= {*_PLAIN, "None"}:
        return {}
    kinds = [{"type": _PLAIN[name]} for name in names if name != "None"]
    if "float" in names:  # 1e-8 is a text to YAML 1.1 and a number to `load`
        kinds.append({"type": "string", "pattern": r"^[-+]?[\d.]+[eE][-+]?\d+$"})
    return {"anyOf": [*kinds, {"type": "null"}, {"type": "string", "pattern": r"^\$\{"}]}


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends without an error
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
