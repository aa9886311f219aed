"""The declaration of a data set: its columns and arguments, written once beside its definition.

The check of a config, the plan, the starter YAML and the comparison read this declaration and know
no data set by name. A module that declares one is imported to check a config, so it imports torch
and other heavy libraries inside its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Build = TypeVar("Build", bound=Callable[..., Any])


class ColumnsError(ValueError):
    """The argument that names a data set's columns is wrong; the text says what is expected."""


@dataclass(frozen=True)
class DataSet:
    """The declaration of a data set.

    Args:
        name: its dotted name, for `_target_`.
        build: returns its samples, given a tokenizer and its arguments.
        source: the argument that names its rows.
        columns: the columns that its rows need; none for a mixture of other data sets.
        read: `read(row, arguments)` reads a row as the data set does, and raises ValueError if
            nothing can be learnt from it.
        limit: the argument that limits the number of rows.
        columns_from: the argument that names other columns, as one name or a mapping to names.
        has_answers: its rows have something to learn; otherwise they are prompts.
    """

    name: str
    build: Callable[..., Any]
    source: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], dict[str, Any]], Any]
    limit: str
    columns_from: str
    has_answers: bool = True

    @property
    def has_parts(self) -> bool:
        """Return whether its source is a list of other data sets' sections."""
        return not self.columns

    @property
    def takes_limit(self) -> bool:
        """Return whether the data set has the argument that limits the number of rows."""
        return self.limit in inspect.signature(self.build).parameters

    def source_of(self, arguments: dict[str, Any]) -> Any:
        """Return the value of the argument that names the rows, or its default."""
        default = inspect.signature(self.build).parameters[self.source].default
        return arguments.get(self.source, default)

    def columns_wanted(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Return the columns that the data set reads with these arguments."""
        given = arguments.get(self.columns_from)
        if isinstance(given, dict):
            return tuple(str(name) for name in given.values())
        return (given,) if isinstance(given, str) else self.columns


_DECLARED: dict[Any, DataSet] = {}


def data_set(
    source: str,
    columns: tuple[str, ...] = (),
    read: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda row, arguments: None,
    limit: str = "limit_dataset_samples",
    columns_from: str = "",
    has_answers: bool = True,
) -> Callable[[Build], Build]:
    """Declare the decorated function as a data set; the arguments are those of `DataSet`."""

    def declare(build: Build) -> Build:
        name = f"{build.__module__}.{build.__qualname__}"
        _DECLARED[build] = DataSet(
            name, build, source, columns, read, limit, columns_from, has_answers
        )
        return build

    return declare


def declaration_of(build: Any) -> DataSet | None:
    """Return the declaration of a data set's function, or None for any other object."""
    try:
        return _DECLARED.get(build)
    except TypeError:  # an object that is not hashable was not declared
        return None
