"""A key of the schema is written once: its type, bounds and sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ds_kd.config.checks.sections import check_section
from ds_kd.config.keys import Kind, key
from ds_kd.config.reference.keys import every_key


def test_every_key_has_a_sentence_and_every_count_a_unit():
    for name, found in every_key():
        first, *rest = found.sentence.split()
        assert first[0].isupper() and rest and found.sentence.endswith("."), name
        assert first not in ("What", "Where", "Whether", "Of", "How"), name
        if name.endswith(("_size", "_steps", "_minutes", "nodes")):
            assert found.unit, name


def _even(value):
    if isinstance(value, int) and value % 2 == 0:
        return value
    raise ValueError("add one")


@dataclass
class Pairs:
    count: Annotated[int, Kind("an even number", {"multipleOf": 2}, _even)] | None = key(
        None, "Sets how many there are.", low=2
    )


def test_a_kind_of_value_is_written_once_and_reads_and_describes_itself():
    problems: list[str] = []
    assert check_section(Pairs, {"count": 4}, "pairs.", problems) == {"count": 4} and not problems
    assert not check_section(Pairs, {"count": 3}, "pairs.", problems)
    assert not check_section(Pairs, {"count": 0}, "pairs.", problems)
    assert problems == [
        "pairs.count: got 3, expected an even number ≥ 2; add one",
        "pairs.count: got 0, expected an even number ≥ 2",
    ]
