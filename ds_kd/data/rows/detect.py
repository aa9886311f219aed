"""Find the data sets of this package, and the one that reads rows with given columns."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ds_kd.data
from ds_kd.data.rows.declaration import DataSet, declaration_of
from ds_kd.data.rows.source import load_rows


@functools.cache
def known_data_sets() -> tuple[DataSet, ...]:
    """Return the data sets that `ds_kd.data` declares, those that need most columns first.

    Files without a declaration are not imported, as some of them need torch.
    """
    found: list[DataSet] = []
    for path in sorted(Path(ds_kd.data.__path__[0]).glob("*.py")):
        if "\n@data_set(" in path.read_text("utf-8"):
            module = importlib.import_module(f"ds_kd.data.{path.stem}")
            found += filter(None, map(declaration_of, vars(module).values()))
    once = {declared.name: declared for declared in found}
    return tuple(sorted(once.values(), key=lambda declared: -len(declared.columns)))


def recognise(columns: Iterable[str]) -> DataSet | None:
    """Return the data set that reads rows with these columns, or None."""
    there = {*columns}
    fits = (each for each in known_data_sets() if each.columns and there >= {*each.columns})
    return next(fits, None)


def columns_known() -> str:
    """Return the columns that the data sets read, for messages."""
    return " or ".join(", ".join(each.columns) for each in known_data_sets() if each.columns)


def samples_of(source: str, tokenizer: Any, limit: int | None, split: str = "train") -> Any:
    """Return the first rows of a file as tokenised samples.

    Args:
        source: see `load_rows`.
        tokenizer: the tokenizer of the model that reads them.
        limit: number of rows; None takes all.
        split: of a directory or a hub data set.

    Raises:
        ValueError: the rows cannot be read, or no data set has their columns.
    """
    columns = load_rows(source, split, (), limit).column_names
    found = recognise(columns)
    if found is None:
        raise ValueError(
            f"{source!r} has the columns {', '.join(sorted(columns))}, expected {columns_known()}"
        )
    arguments: dict[str, Any] = {found.source: source, found.limit: limit, "split": split}
    return found.build(tokenizer=tokenizer, **arguments)
