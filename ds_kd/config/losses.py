"""Check the section of the distillation loss, which a `name` may choose and a list may add up."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ds_kd.config.checks.components import check_component
from ds_kd.config.components import Component, problem
from ds_kd.config.keys import Key, is_number
from ds_kd.config.names import home_of
from ds_kd.config.permissions import translate
from ds_kd.config.signatures import divergences_by_name
from ds_kd.config.text.origins import decode

_NEEDS_DIVERGENCE = (
    "hidden_states compares layers, and the logits need a loss too; write a list such as "
    "[{name: forward_kl, weight: 1}, {name: hidden_states, weight: 1, layers: [[7, 15]]}]"
)


def check_divergence(
    value: Any, key: Key, config_only: bool, problems: list[str]
) -> Component | None:
    """Return the component of the distillation loss, after adding its problems to `problems`.

    Args:
        value, key, config_only, problems: as for `check_component`.
    """
    if not isinstance(value, list):
        component = _check_named(value, key, config_only, problems)
        if component is not None and is_of_layers(component):
            problems.append(f"{key.name}: {_NEEDS_DIVERGENCE}")
        return component
    if not value:
        example = "[{name: forward_kl, weight: 0.5}, {name: reverse_kl, weight: 0.5}]"
        problems.append(problem(key.name, value, f"a list such as {example}"))

    # Each part is checked as a section of its own, without its weight.
    parts = []
    for number, inner in enumerate(value):
        part = replace(key, name=f"{key.name}[{number}]")
        section, weight = inner, None
        if isinstance(inner, dict):
            section = {name: each for name, each in inner.items() if name != "weight"}
            weight = decode(inner.get("weight"))
            expected = "a number > 0, by which this loss is multiplied"
            if weight is None:
                problems.append(f"{part.name}.weight: missing; write {expected}")
            elif not (is_number(weight) and weight > 0):
                problems.append(problem(f"{part.name}.weight", weight, expected))
        elif inner is None:
            problems.append(problem(part.name, inner, "a mapping such as {name: …, weight: …}"))
        component = _check_named(section, part, config_only, problems)
        if component is not None and is_of_layers(component):
            problems += _check_layers(component)
        if component is not None and is_number(weight):
            parts.append((float(weight), component))
    if parts and all(is_of_layers(component) for _, component in parts):
        problems.append(f"{key.name}: {_NEEDS_DIVERGENCE}")
    return Component("", {}, key.name, parts=tuple(parts)) if parts else None


def is_of_layers(component: Component) -> bool:
    """Return whether a loss compares layers of the models, not their logits."""
    return home_of(component.name) == home_of(divergences_by_name()["hidden_states"])


def _check_layers(component: Component) -> list[str]:
    """Return the problems of the arguments of a loss that compares layers."""
    key, found = component.key, []
    pairs = component.kwargs.get("layers")
    good = isinstance(pairs, list) and pairs and all(_is_pair(pair) for pair in pairs)
    if "layers" in component.kwargs and not good:
        expected = "pairs [student's layer, teacher's layer] from 0, such as [[7, 15], [15, 29]]"
        found.append(problem(f"{key}.layers", pairs, expected))
    distance = component.kwargs.get("distance", "cosine")
    if isinstance(distance, str) and distance not in ("cosine", "mse"):
        found.append(problem(f"{key}.distance", distance, "cosine or mse"))
    return found


def find_absent_layer(part: Component, student: Any, teacher: Any) -> str:
    """Return the problem of a pair of layers that the models lack, or an empty text.

    Args:
        student, teacher: the models' numbers of layers; one that is no number is not compared.
    """
    for pair in filter(_is_pair, part.kwargs.get("layers") or []):
        counts = (student, teacher)
        if any(isinstance(n, int) and at >= n for at, n in zip(pair, counts, strict=True)):
            expected = f"a student's layer below {student} and a teacher's below {teacher}"
            return problem(f"{part.key}.layers", pair, expected)
    return ""


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    )


def _check_named(value: Any, key: Key, config_only: bool, problems: list[str]) -> Component | None:
    """Return the component of a section, after looking up the `name` that stands for a `_target_`.

    Args:
        value, key, config_only, problems: as for `check_component`.
    """
    target = value.get("_target_") if isinstance(value, dict) else None
    is_from_outside = isinstance(target, str) and not _is_ours(target)
    if not isinstance(value, dict) or "name" not in value or is_from_outside:
        return check_component(value, key, config_only, problems)

    # From here on `name` is the config's own key, not an argument of a class from outside.
    name, known = decode(value["name"]), divergences_by_name()
    section = {other: each for other, each in value.items() if other != "name"}
    if name is None:
        return check_component(section, key, config_only, problems)
    if target is not None:
        problems.append(
            f"{key.name}: name {name} and _target_ {target} are both given; write "
            f"{key.name}._target_=null too, or remove the name"
        )
        return None
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), known, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        problems.append(problem(f"{key.name}.name", name, " or ".join(known), hint))
        return None
    section["_target_"] = known[name]
    return check_component(section, key, config_only, problems)


def _is_ours(target: str) -> bool:
    """Return whether a `_target_` leads to a class of the project."""
    return translate(target).startswith("ds_kd.")
