"""Decode JSON in which no key stands twice."""

from __future__ import annotations

import json
from typing import Any


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} stands twice in it")
    return made


class _Decoder(json.JSONDecoder):
    """A decoder that can be pickled: `datasets` pickles what a function uses, to know it again."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_refuse_repeated_keys)

    def __reduce__(self) -> tuple[type[_Decoder], tuple[()]]:
        return _Decoder, ()


DECODER = _Decoder()
