"""Check the plain keys of a config: each is known, of its kind and within its bounds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ds_kd.config.components import problem
from ds_kd.config.keys import Key, keys_of
from ds_kd.config.names import REFUSED_KEYS
from ds_kd.config.signatures import signature_of
from ds_kd.config.text.origins import decode

_LONGEST = 100  # characters of a key that are compared with the known ones


def check_section(cls: Any, data: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    """Return the values of a section in their own types; absent keys are left to their defaults.

    Args:
        cls: the section's dataclass in the schema.
        data: the YAML's section; `_target_` sections in it are left to `check_component`.
        prefix: the beginning of its keys' full names.
        problems: takes a line for each wrong value.
    """
    known, values = keys_of(cls), {}
    for name, value in data.items():
        path = f"{prefix}{name}"
        if path in REFUSED_KEYS:
            if not _is_off(value):
                problems.append(f"{path}: {REFUSED_KEYS[path]}")
        elif name not in known:
            problems.append(f"{path}: unknown key; {_suggest_key(name, prefix, known)}")
        elif known[name].component is None:
            checked = _check_key(path, value, known[name], problems)
            if checked is not None:
                values[name] = checked
    return values


def _check_key(path: str, value: Any, key: Key, problems: list[str]) -> Any:
    """Return a key's value in its own type, or None; a wrong value adds a problem."""
    if key.section is not None:
        if isinstance(value, dict):
            return key.section(**check_section(key.section, value, f"{path}.", problems))
        if value is not None:
            first = next(name for name in keys_of(key.section) if name != "_target_")
            problems.append(problem(path, value, f"a mapping such as {{{first}: …}}"))
        return None
    if value is None:
        if key.default not in (None, []):
            hint = "leave the key out for its default"
            problems.append(problem(path, None, key.expected, hint))
        return None
    value = value if key.kind.keeps_text else decode(value)
    try:
        return key.read(value)
    except ValueError as error:
        problems.append(problem(path, value, key.expected, str(error)))
        return None


def _suggest_key(name: Any, prefix: str, known: Mapping[str, Key]) -> str:
    """Return a hint at the key that was probably meant: one of these, or one of their sections."""
    inner: dict[str, list[str]] = {}
    for section, key in known.items():
        for part in _names_in(key):
            inner.setdefault(part, []).append(f"{section}.{part}")

    word = str(name)[:_LONGEST]  # a comparison takes time by its length
    near = inner.get(word) or difflib.get_close_matches(word, known, 1, 0.75)
    if not near and (parts := difflib.get_close_matches(word, inner, 1, 0.85)):
        near = inner[parts[0]]
    meant = " or ".join(f"{prefix}{each}" for each in near)
    return f"did you mean {meant}?" if near else f"known here: {', '.join(known)}"


def _names_in(key: Key) -> list[str]:
    """Return the names of the keys in a section; none for another key."""
    if key.section is not None:
        return [*keys_of(key.section)]
    signature = signature_of(key.component.calls) if key.component is not None else None
    return [] if signature is None else [*signature.annotations]


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False
    return value is None or value is False
