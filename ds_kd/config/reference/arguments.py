"""Find the callables that a `_target_` section may name, and their arguments."""

from __future__ import annotations

from ds_kd.config.keys import ComponentRules
from ds_kd.config.names import ALIASES, ALLOWED, MODEL, home_of
from ds_kd.config.signatures import divergences_by_name, signature_of
from ds_kd.data.rows.detect import known_data_sets


def callables_of(rules: ComponentRules) -> list[str]:
    """Return the names that the project knows for a section, its default first."""
    ours = (each.name for each in known_data_sets())
    names = {*ALIASES.values(), *ALLOWED, *ours, *divergences_by_name().values()} - {MODEL}
    found = sorted(name for name in names if home_of(name).startswith(rules.may_call))
    known = [name for name in found if signature_of(name) is not None and "collate" not in name]
    return sorted(known, key=lambda name: name != rules.calls)


def arguments_of(name: str, rules: ComponentRules) -> tuple[dict[str, str], bool]:
    """Return a callable's arguments with their annotations, and whether it takes others.

    Arguments that ds_kd passes itself are left out; the section's own words and flags are added.
    """
    signature = signature_of(name)
    assert signature is not None
    taken = {n: text for n, text in signature.annotations.items() if n not in rules.given}
    source = next((d.source for d in known_data_sets() if d.name == name and not d.has_parts), None)
    if source is not None:  # every data set takes this name for its rows
        taken.setdefault("dataset_name", taken.get(source, ""))
    words = {word: f"Literal{[*values]}" for word, values in rules.words.items()}
    return {**taken, **words, **dict.fromkeys(rules.flags, "bool")}, signature.is_open
