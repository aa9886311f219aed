"""Check interpolations: `${oc.env:VAR}`, `${oc.env:VAR,default}` and `${section.key}` are allowed.

They are checked before OmegaConf reads them, whose parser takes half a minute for thousands.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.text.secrets import is_secret, is_under_secret

MOST = 1000  # replacements; OmegaConf needs up to a millisecond for each
TOO_MANY = f"more than {MOST} ${{…}}, or they grow beyond all bounds; write the values out"
_MAX_LENGTH, _DEEPEST = 1_000_000, 5
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_VARIABLE = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)\s*(?:,(.*))?", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_PUBLIC = {"HOME", "USER", "LOGNAME", "HOSTNAME", "PWD", "TMPDIR"}
_ALLOWED = "${section.key}, ${oc.env:VAR} or ${oc.env:VAR,default}"


def check_interpolations(tree: Any) -> None:
    """Refuse interpolations of other forms, and references that refer to themselves or multiply.

    Raises:
        ConfigError: names the key.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def size(value: Any, key: str) -> tuple[int, int]:
        """Return (characters and values, replacements) at a key when all is replaced."""
        if key not in sizes:
            sizes[key] = _MAX_LENGTH + 1, 1  # what a reference to itself finds
            sizes[key] = add_up(parts(value, key), value)
            if sizes[key][0] > _MAX_LENGTH and isinstance(value, str):
                raise ConfigError([f"{key}: its ${{…}} refer to itself or grow beyond all bounds"])
        return sizes[key]

    def parts(value: Any, key: str) -> list[tuple[int, int]]:
        if isinstance(value, dict):
            return [size(v, f"{key}.{n}" if key else str(n)) for n, v in value.items()]
        if isinstance(value, list):
            return [size(v, f"{key}.{k}") for k, v in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return []
        names, variables = references(value, key)
        found = [size(find(tree, name), name) for name in names]
        found += [(len(os.environ.get(name, "")), 0) for name in variables]
        return [*found, (0, len(names) + len(variables))]

    def add_up(inner: list[tuple[int, int]], value: Any) -> tuple[int, int]:
        own = len(value) if isinstance(value, str) else 1
        return own + sum(length for length, _ in inner), sum(count for _, count in inner)

    # Sizes are added up without replacing anything: the text itself could be gigabytes.
    length, count = size(tree, "")
    if length > _MAX_LENGTH or count > MOST:
        raise ConfigError([TOO_MANY])


def find(tree: Any, path: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in path.split("."):
        if isinstance(tree, list) and part.isdigit() and len(part) < 10:
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def references(value: str, key: str) -> tuple[list[str], list[str]]:
    """Return the keys and the variables that the `${…}` of a text refer to.

    Raises:
        ConfigError: one has another form; the message names `key`.
    """
    names: list[str] = []
    variables: list[str] = []

    def replace(match: re.Match[str]) -> str:
        inner = match[1].strip()
        if variable := _VARIABLE.fullmatch(inner):
            variables.append(variable[1])
        elif _KEY.fullmatch(inner):
            names.append(inner)
        else:
            resolver, colon, _ = inner.partition(":")
            if colon and resolver != "oc.env":
                given = f"${{{resolver}:…}} is not known here"
                raise ConfigError([f"{key}: {given}; write {_ALLOWED}"])
            raise ConfigError(
                [problem(key, f"${{{inner}}}", f"the whole key written out: {_ALLOWED}")]
            )
        return "\0"

    # The innermost come first: the default of a variable may be another interpolation.
    for _ in range(_DEEPEST):
        value, count = _INNERMOST.subn(replace, value)
        if not count:
            break
    if "${" in value:
        raise ConfigError([f"{key}: a ${{…}} is left open, or has braces inside; write {_ALLOWED}"])
    return names, variables


def comes_from_secret(value: Any, tree: Any) -> bool:
    """Return whether a text takes anything from a secret key or variable, directly or not.

    Args:
        value: the text before its `${…}` are replaced.
        tree: the whole config before replacement, already checked.
    """
    if not isinstance(value, str) or "${" not in value:
        return False
    names, variables = references(value, "")
    return any(map(is_secret, variables)) or any(
        is_under_secret(name) or comes_from_secret(find(tree, name), tree) for name in names
    )


def comes_from_variable(value: Any, tree: Any) -> bool:
    """Return whether a text takes anything from an environment variable that is set, directly or
    not; those that name a user, a machine or a job do not count. The arguments are as above."""
    if not isinstance(value, str) or "${" not in value:
        return False
    names, variables = references(value, "")
    return any(
        name in os.environ and name not in _PUBLIC and not name.startswith("SLURM_")
        for name in variables
    ) or any(comes_from_variable(find(tree, name), tree) for name in names)
