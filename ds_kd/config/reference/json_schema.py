"""The config's schema as JSON Schema: `python -m ds_kd.config.reference.json_schema`."""

from __future__ import annotations

import ast
import json
import signal
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ds_kd.config.keys import ComponentRules, Key, keys_of
from ds_kd.config.names import ALIASES, CHAT_WITHOUT_EFFECT, WITHOUT_EFFECT
from ds_kd.config.reference.arguments import arguments_of, callables_of
from ds_kd.config.schema import RunConfig
from ds_kd.config.signatures import divergences_by_name, signature_of

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
        if key.component.has_names:
            wanted.append(_describe_sum(key.component))
        if key.component.may_be_named:
            part = {"anyOf": [_describe_component(key.component), {"type": "null"}]}
            several = {"type": "object", "minProperties": 1, "not": {"required": ["_target_"]}}
            named = {"patternProperties": {r"^\w+$": part}, "additionalProperties": False}
            wanted.append({**several, **named})
    elif not key.kind.json:
        return {"description": key.sentence}
    else:
        wanted = [{**key.kind.json, **{_BOUNDS[name]: key.bounds[name] for name in key.bounds}}]
    loose: list[dict[str, Any]] = [{"type": "null"}, _INTERPOLATED]
    loose += [{"const": "none"}] if key.name.endswith("_size") else []
    return {"description": key.sentence, "anyOf": [*wanted, *loose]}


def _describe_component(
    rules: ComponentRules, others: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the schema of a `_target_` section, with a case for each callable that it may name.

    Args:
        others: further keys of the section, with their schemas.
    """
    names = _names_of(rules)
    properties: dict[str, Any] = {"_target_": {"type": "string"}, **others}
    made: dict[str, Any] = {"type": "object", "properties": properties}
    if not rules.calls:
        made["required"] = ["_target_"]
    cases: list[dict[str, Any]] = []
    if names:
        properties |= {"_target_": {"type": ["string", "null"]}, "name": {}}
        known = {"anyOf": [{"enum": [*names.values(), None]}, _INTERPOLATED]}
        cases.append({"if": _NO_TARGET, "then": {"properties": {"name": known}}})

    # Each callable is one `if`/`then`: with this name, these arguments.
    for name in callables_of(rules):
        arguments, is_open = _describe_arguments(name, rules)
        then: dict[str, Any] = {"properties": {"_target_": True, **others, **arguments}}
        if names:
            then["properties"]["name"] = {"enum": [names[name], None]}
        if not is_open:
            then["additionalProperties"] = False
        cases.append({"if": _choose(name, rules), "then": then})
        for argument, schema in arguments.items():
            earlier = properties.setdefault(argument, schema)
            properties[argument] = earlier if earlier == schema else {}  # each case has its own
    return {**made, "allOf": cases} if cases else made


_NO_TARGET = {"properties": {"_target_": {"type": "null"}}}  # none at all, or null
_INTERPOLATED = {"type": "string", "pattern": r"^\$\{"}


def _names_of(rules: ComponentRules) -> dict[str, str]:
    """Return the callables that `name` may choose in a section: dotted name → name."""
    known = divergences_by_name() if rules.has_names else {}
    return {dotted: name for name, dotted in known.items()}


def _choose(name: str, rules: ComponentRules) -> dict[str, Any]:
    """Return the schema of the sections that call this callable."""
    spellings = [name, *(other for other, ours in ALIASES.items() if ours == name)]
    chosen: dict[str, Any] = {"properties": {"_target_": {"enum": spellings}}}
    names, is_default = _names_of(rules), name == rules.calls
    if names or not is_default:
        chosen["required"] = ["_target_"]
    if not names:
        return chosen
    words = {"enum": [names[name], None] if is_default else [names[name]]}
    by_name = {"properties": {"name": words, **_NO_TARGET["properties"]}, "required": ["name"]}
    neither = {"not": {"anyOf": [{"required": ["name"]}, {"required": ["_target_"]}]}}
    return {"anyOf": [chosen, by_name, *([neither] if is_default else [])]}


def _describe_arguments(name: str, rules: ComponentRules) -> tuple[dict[str, Any], bool]:
    """Return the schemas of a callable's arguments, and whether it takes others."""
    taken, is_open = arguments_of(name, rules)
    found = {argument: _describe_annotation(text) for argument, text in taken.items()}
    signature = signature_of(name)
    for argument, low, high in signature.limits if signature is not None else ():
        ends = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        ends = {end: value for end, value in ends.items() if value is not None}
        found[argument] = {"allOf": [found[argument], ends]}
    if "tokenizer" in rules.given:
        found["tokenizer"] = {"description": "Accepted where it is the student's own."}
    if name.endswith(".ChatDataset"):
        told = CHAT_WITHOUT_EFFECT.items()
        found |= {key: {"description": f"Accepted; {why}."} for key, why in told}
        found["mask_reasoning_content"] = {"enum": [False, None]}
    return found, is_open


def _describe_sum(rules: ComponentRules) -> dict[str, Any]:
    """Return the schema of a list of sections that are added up, each with its weight."""
    weight = {"allOf": [_describe_annotation("float"), {"exclusiveMinimum": 0}]}
    part = _describe_component(rules, {"weight": weight})
    return {"type": "array", "minItems": 1, "items": {**part, "required": ["weight"]}}


_PLAIN = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


def _describe_annotation(annotation: str) -> dict[str, Any]:
    """Return the schema of a plain annotation, of words or of pairs of integers; any value is
    accepted for another."""
    if annotation == "list[tuple[int, int]]":
        number = {"type": "integer", "minimum": 0}
        pair = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
        return {"anyOf": [{"type": "array", "minItems": 1, "items": pair}, _INTERPOLATED]}
    if annotation.startswith("Literal["):
        words = ast.literal_eval(annotation.removeprefix("Literal"))
        return {"anyOf": [{"enum": words}, _INTERPOLATED]}
    names = [name.strip() for name in annotation.split("|")]
    if not annotation or not set(names) <= {*_PLAIN, "None"}:
        return {}
    kinds = [{"type": _PLAIN[name]} for name in names if name != "None"]
    if "float" in names:  # 1e-8 is a text to YAML 1.1 and a number to `load`
        kinds.append({"type": "string", "pattern": r"^[-+]?[\d.]+[eE][-+]?\d+$"})
    return {"anyOf": [*kinds, {"type": "null"}, _INTERPOLATED]}


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends without an error
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
