"""What a data set tells about itself, once, beside its definition.

The check of a config, the plan, the starter YAML and the comparison ask this declaration and know
no data set by name. Modules that declare one are imported to check a config, so they import torch
and the like inside their functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Build = TypeVar("Build", bound=Callable[..., Any])


@dataclass(frozen=True)
class DataSet:
    """A data set's rows and arguments.

    Args:
        name: dotted, as `_target_` has it.
        build: what makes its samples from a tokenizer and its arguments.
        source: the argument that names its rows.
        columns: that its rows need; none where it is made of other data sets.
        read: `read(row, arguments)` reads a row as the data set does, and raises ValueError where
            nothing can be learnt from it.
        limit: the argument that keeps the first so many rows.
        columns_from: the argument that gives other columns, as one name or a mapping to names.
    """

    name: str
    build: Callable[..., Any]
    source: str
    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], dict[str, Any]], Any]
    limit: str
    columns_from: str

    @property
    def has_parts(self) -> bool:
        """Whether its source is a list of other data sets' sections."""
        return not self.columns

    def source_of(self, arguments: dict[str, Any]) -> Any:
        """Return what names the rows: the argument, or the function's own default."""
        default = inspect.signature(self.build).parameters[self.source].default
        return arguments.get(self.source, default)

    def columns_wanted(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Return the columns that it reads with these arguments."""
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
) -> Callable[[Build], Build]:
    """Declare the function below as a data set; the arguments are those of `DataSet`."""

    def declare(build: Build) -> Build:
        name = f"{build.__module__}.{build.__qualname__}"
        _DECLARED[build] = DataSet(name, build, source, columns, read, limit, columns_from)
        return build

    return declare


def declaration_of(build: Any) -> DataSet | None:
    """Return what a function's module declares of it; None where it is no declared data set."""
    try:
        return _DECLARED.get(build)
    except TypeError:  # not hashable, so none of them
        return None
