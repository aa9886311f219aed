"""The callables that a `_target_` section may name, and their arguments, from their sources."""

from __future__ import annotations

from typing import Any

from ds_kd.config.names import ALIASES, ALLOWED
from ds_kd.config.schema import MODEL
from ds_kd.config.signatures import signature_of
from ds_kd.data.rows.detect import known_data_sets


def callables_of(meta: Any) -> list[str]:
    """Return the names that the project knows for a section, its default first.

    Args:
        meta: of the schema.
    """
    kinds, default = meta.get("calls", ()), meta.get("target")
    ours = (each.name for each in known_data_sets())
    names = {*ALIASES.values(), *ALLOWED, *ours} - {MODEL}
    found = sorted(name for name in names if kinds and name.startswith(kinds))
    known = [name for name in found if signature_of(name) is not None and "collate" not in name]
    return sorted(known, key=lambda name: name != default)


def arguments_of(name: str, meta: Any) -> tuple[dict[str, str], bool]:
    """Return a callable's arguments with their annotations, and whether it takes others.

    What ds_kd gives itself is left out; the section's own flags are there.
    """
    signature = signature_of(name)
    assert signature is not None
    given = meta.get("given", ())
    taken = {n: text for n, text in signature.annotations.items() if n not in given}
    return {**taken, **dict.fromkeys(meta.get("flags", ()), "bool")}, signature.is_open
