"""Check a data set before a run starts: find its declaration, and look at the local files that its
section names."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
from pathlib import Path
from typing import Any

from ds_kd.config.checks.files import is_directory, looks_local
from ds_kd.config.components import ConfigError, problem, resolve
from ds_kd.config.signatures import signature_of
from ds_kd.data.rows.declaration import ColumnsError, DataSet, data_set, declaration_of
from ds_kd.data.rows.detect import recognise
from ds_kd.data.rows.files import (
    ENDINGS,
    FORMATS,
    columns_of,
    ending_of,
    files_of,
    sample_rows,
)
from ds_kd.errors import first_line


@functools.lru_cache(maxsize=None, typed=True)  # a name and a permitted name compare equal
def find_declaration(dotted: str) -> DataSet | None:
    """Return the declaration of a data set, or None if it has none.

    Only a module whose source holds a declaration for that name is imported.

    Args:
        dotted: its name, after the translation of NeMo-AutoModel's names.

    Raises:
        ConfigError: the name is refused, or its module cannot be imported.
    """
    signature = signature_of(dotted)
    if signature is None or data_set.__name__ not in signature.decorators:
        return None
    try:
        return declaration_of(resolve(dotted))
    except ConfigError:
        raise
    except Exception as error:  # a user's module may raise any error
        kind = type(error).__name__
        raise ConfigError([f"{dotted} cannot be imported: {kind}: {first_line(error)}"]) from error


def check_data(key: str, data: DataSet, kwargs: dict[str, Any], written: str = "") -> str | None:
    """Return the problem of the local files that a data set names, or None; reads a few rows.

    Args:
        key: the name of its section.
        written: the YAML's name of the argument that names the files, if that is a synonym.
    """
    columns, source = data.columns_wanted(kwargs), kwargs.get(data.source)
    if source is None:
        return None
    chooser = f"{key}.{data.columns_from}"
    if expected := _find_wrong_columns(data, columns, kwargs):
        return problem(chooser, kwargs[data.columns_from], expected)
    key = f"{key}.{written or data.source}"

    # A source that is no local file may be a hub id, which only the run itself can look for.
    if wrong := find_wrong_source(key, source):
        return wrong
    files = files_of(source)
    if files is None:
        if not is_directory(source) or may_hold(Path(source), columns):
            return None
        expected = f"a directory of rows with {', '.join(columns)}"
        return problem(key, source, expected, "none of its files has them")

    for name in files:
        try:
            found = columns_of(name)
        except (OSError, ValueError, RecursionError) as error:
            return problem(key, name, f"rows with {', '.join(columns)}", first_line(error))
        if not {*columns} <= {*found}:
            hint = f"its first row has {', '.join(found)}"
            if kwargs.get(data.columns_from) is not None:
                return problem(chooser, kwargs[data.columns_from], f"columns of {name}", hint)
            if data.columns_from:
                hint += f"; {chooser} names others"
            turns = next((name for name in ("messages", "conversations") if name in found), None)
            if turns and not data.has_answers:
                hint += f": write {turns}"
            elif other := recognise(found):
                hint += f"; {key.rpartition('.')[0]}._target_: {other.name} reads such rows"
            return problem(key, name, f"rows with {', '.join(columns)}", hint)
        if wrong := _find_wrong_row(name, data, kwargs, len(files)):
            return problem(key, name, "rows that can be learnt from", wrong)
    return None


def find_wrong_source(key: str, source: Any) -> str | None:
    """Return the problem of a source of rows that is not there, or None. A hub id is not looked
    up."""
    try:
        if files_of(source) is not None:
            return None
    except (OSError, ValueError) as error:  # a name longer than one may be
        expected = "a file that exists" if isinstance(source, str) else "files of rows"
        return problem(key, source, expected, first_line(error))
    if (source and is_directory(source)) or not (looks_local(source) or _looks_like_file(source)):
        return None
    is_text = str(source).lower().endswith((".txt", ".md"))
    hint = 'texts are rows of their own: a .jsonl file of {"text": …} lines' if is_text else ""
    return problem(key, source, f"{ENDINGS}, a directory, or a hub id", hint)


#: Files in a directory that are looked at, and endings of other files that `datasets` reads.
_MOST_FILES = 2000
_FORMATS_LEFT = (".arrow", ".ndjson", ".tar", ".zip", ".hdf5", ".h5", ".lance", ".avro")


def may_hold(directory: Path, columns: tuple[str, ...]) -> bool:
    """Return whether a directory may hold rows with these columns: a file of it has them, or is
    one that only `datasets` can read."""
    if any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True

    # Plain texts are rows with the column text. Other files of a kind may be documentation.
    seen = 0
    for place, _, names in os.walk(directory):
        if (seen := seen + len(names)) > _MOST_FILES:
            return True
        for name in names:
            if name == "README.md" and "configs:" in _begin(Path(place, name)):
                return True  # it names the files
            ending = Path(name).suffix.lower()
            if ending in _FORMATS_LEFT or (ending == ".txt" and columns == ("text",)):
                return True
            with contextlib.suppress(OSError, ValueError, RecursionError):
                if ending_of(name) and {*columns} <= {*columns_of(Path(place, name))}:
                    return True
    return False


def _begin(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            return file.read(1 << 16)
    except OSError:
        return ""


#: Endings of files that no data set reads, and first parts of paths that are no owners on the hub.
_OTHER_ENDINGS = (".txt", ".md", ".xlsx", ".arrow", ".zip", ".tar", ".xz", ".bz2", ".pkl", ".zstd")
_DIRECTORIES = ("data", "datasets", "dataset", "corpus", "rows", "tmp", "home")


def _looks_like_file(name: str) -> bool:
    """Return whether a possible hub id is more likely the mistyped name of a file."""
    ending, (first, slash, _) = Path(name).suffix.lower(), name.partition("/")
    is_near = bool(difflib.get_close_matches(ending, FORMATS, n=1, cutoff=0.75))
    return is_near or ending in _OTHER_ENDINGS or (bool(slash) and first in _DIRECTORIES)


def _find_wrong_columns(data: DataSet, columns: tuple[str, ...], kwargs: dict[str, Any]) -> str:
    """Return what is expected of the argument that names the columns, or an empty text."""
    if kwargs.get(data.columns_from) is None:
        return ""
    try:
        data.read(dict.fromkeys(columns, ""), kwargs)
    except ColumnsError as error:
        return str(error)
    except Exception:  # an empty row may be wrong in other ways, which the real rows show
        return ""
    return ""


def _find_wrong_row(name: str, data: DataSet, kwargs: dict[str, Any], files: int) -> str:
    """Return the problem of some sampled rows of a file, or an empty text. A slice of a split is
    not checked, as it may leave these rows out."""
    limit, split = kwargs.get(data.limit), kwargs.get("split")
    if "[" in str(split):
        return ""
    try:
        for place, row in sample_rows(name, limit if isinstance(limit, int) else None, files):
            try:
                data.read(row, kwargs)
            except KeyError as error:
                return f"{place}: no column {error}"
            except ValueError as error:
                return f"{place}: {error}"
    except RecursionError:
        return "its rows are nested too deeply"
    except (OSError, ValueError) as error:
        return first_line(error)
    return ""
