"""Load rows from the hub, local files or a directory, and tokenise them."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ds_kd.data.rows.decoder import DECODER
from ds_kd.data.rows.files import (
    BEGINNING,
    ENDINGS,
    FORMATS,
    columns_of,
    ending_of,
    files_of,
    find_line,
    find_wrong_cell,
    find_wrong_line,
    read_beginning,
)
from ds_kd.errors import first_line
from ds_kd.hub import expect_hub, may_be_hub_id

T = TypeVar("T")

_FIRST = 16  # rows tokenised before all others, and as many random ones
_FEW = 64  # files, of which more is looked at than of many
_MULTIPROCESS_FROM = 20_000  # rows; below, starting processes costs more than it saves
_CODE = Path(__file__).parents[1]  # ds_kd/data


def refuse_to_replace(source: str, output: Path) -> None:
    """Refuse an output that is one of the files that rows are read from.

    Raises:
        FileExistsError: it is.
    """
    try:
        read = files_of(source) or []
    except ValueError:  # told when the rows are read
        return
    # Unlike Path.resolve, realpath takes a link that leads in a circle.
    if os.path.realpath(output) in [os.path.realpath(name) for name in read]:
        raise FileExistsError("it is a file of --data, which it would replace; give another name")


def load_rows(
    source: str | list[str], split: str, columns: tuple[str, ...], limit: int | None = None
) -> Any:
    """Return the rows of one split as a `datasets.Dataset`.

    Args:
        source: a local file, a pattern or a list of files (they are concatenated and serve any
            split), a directory of splits or one written by `save_to_disk`, or a hub id.
        split: `train`, or a slice such as `train[:100]`.
        columns: the columns that the rows must have.
        limit: keep only the first rows, this many.

    Raises:
        ValueError: the source does not exist or cannot be read, or lacks the split, columns or
            rows; names the source.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"the sample limit must be an integer ≥ 1, got {limit!r}")
    try:
        files = files_of(source)
        rows = _load(str(source), split) if files is None else _load_files(files, split)
    # `datasets` has many exceptions for bad content, unknown splits and a missing network.
    except Exception as error:
        raise ValueError(f"{source!r}, split {split!r}: {_describe_error(error)}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source!r}: no column {', '.join(missing)}; found {', '.join(rows.column_names)}, "
            f"needed {', '.join(columns)}"
        )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{source!r}, split {split!r}: no rows")
    return rows


@functools.cache
def find_held_out(source: str) -> str:
    """Return the split of a source by which a model is judged: `validation` of a directory or a hub
    data set that has one, else `train`. Files have no splits, and serve any. A source is asked once
    in a process.

    Raises:
        ValueError: its splits cannot be told.
    """
    import datasets

    expect_hub(source)
    try:
        if files_of(source) is not None or (Path(source) / "state.json").is_file():
            return "train"
        names = Path(source) / "dataset_dict.json"
        there = (
            json.loads(names.read_text("utf-8"))["splits"]
            if names.is_file()
            else datasets.get_dataset_split_names(source)
        )
    except FileNotFoundError:  # `load_rows` tells what is wrong with it
        return "train"
    except Exception as error:  # of many kinds; the training split would be taken without a word
        raise ValueError(f"{source!r}: its splits cannot be told: {first_line(error)}") from error
    return "validation" if "validation" in there else "train"


def _load_files(files: list[str], split: str) -> Any:
    import datasets

    kind = FORMATS[ending_of(files[0])]
    options: dict[str, Any] = {}
    if kind == "csv":  # read as text, as type inference would change numbers and empty cells
        names = columns_of(files[0])
        options = {
            "sep": "\t" if ending_of(files[0]) == ".tsv" else ",",
            "keep_default_na": False,
            "quoting": csv.QUOTE_MINIMAL,
            "features": datasets.Features({name: datasets.Value("string") for name in names}),
        }
    for name in files:
        if kind == "json":
            _refuse_crashing_row(name, len(files))
        elif kind == "csv" and (wrong := find_wrong_cell(name)):
            raise ValueError(f"{name}, {wrong}" if len(files) > 1 else wrong)
    named = {split.split("[")[0]: files}
    try:
        return datasets.load_dataset(kind, data_files=named, split=split, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        # Its own message counts rows in a block of the file, and names no file.
        for name in files if kind == "json" else ():
            if wrong := find_wrong_line(name):
                raise ValueError(f"{name}, {wrong}" if len(files) > 1 else wrong) from error
        raise


def _refuse_crashing_row(name: str, files: int) -> None:
    """Refuse a first row at which the JSON reader of `datasets` ends the process without a word: a
    null, or one nested without bound.

    Args:
        files: number of files of the data set; of many, less is looked at.

    Raises:
        ValueError: says what the row is.
    """
    of = f"{name}, " if files > 1 else ""
    try:
        text, *_ = read_beginning(name, BEGINNING if files <= _FEW else BEGINNING >> 6)
        row, _ = DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError(f"{of}its first row is nested too deeply") from None
    except ValueError:  # cut off, or told better by the reader
        return
    if row is None:
        raise ValueError(f"{of}its first row is null, not a mapping of columns")


def _load(source: str, split: str) -> Any:
    import datasets

    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        return _slice(datasets.load_from_disk(path), split)
    if (path / "state.json").is_file():
        return _slice({split.split("[")[0]: datasets.load_from_disk(path)}, split)

    # A name that cannot be a hub id is not looked up there.
    if path.is_file():
        raise ValueError(f"it is not {ENDINGS}; name such a file")
    if not path.is_dir() and not may_be_hub_id(source):
        raise FileNotFoundError(f"no such file or directory; give {ENDINGS}, or a hub id")
    expect_hub(source)
    try:
        return datasets.load_dataset(source, split=split)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError, OSError) as error:
        if path.is_dir():
            raise
        raise ConnectionError(
            "not on this machine, and the hub does not give it; without a network give a local "
            ".json, .jsonl or .parquet file"
        ) from error


def _slice(splits: Any, split: str) -> Any:
    """Return a split such as `train[:10]` or `train[10%:]` of data sets that are already open."""
    import datasets

    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _describe_error(error: BaseException) -> str:
    """Return an error in one line; `datasets` wraps the cause in an error that does not name it."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    # A file of nothing but blank lines makes an empty split, which `datasets` does not have.
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "no rows"
    return first_line(error)


def text_of(row: dict[str, Any], column: str) -> str:
    """Return the text of a row's column.

    Raises:
        ValueError: its value is no text.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r:.80}, expected text")
    return value


def make_samples(
    source: str | list[str],
    split: str | None,
    columns: tuple[str, ...],
    limit: int | None,
    make: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
    """Return the samples `make(row)` of all rows; see `load_rows` and `tokenize`.

    Raises:
        ValueError: the rows cannot be read, or one is wrong; then names its file and number.
    """
    rows = load_rows(source, split or "train", columns, limit)
    with name_bad_text(source):
        return tokenize(rows, name_bad_row(source, split, make))


def name_bad_row(
    source: str | list[str], split: str | None, make: Callable[[dict[str, Any]], T]
) -> Callable[[dict[str, Any], int], T]:
    """Return a function of a row and its number that calls `make(row)`, and adds the row's place
    to its ValueError."""

    def made(row: dict[str, Any], index: int) -> T:
        try:
            return make(row)
        except UnicodeDecodeError:  # see `name_bad_text`
            raise
        except ValueError as error:
            place = _locate_row(source, split or "train", index)
            raise ValueError(f"{place}: {error}") from None

    return made


@contextmanager
def name_bad_text(source: str | list[str]) -> Iterator[None]:
    """Turn the error of a text that is not UTF-8 into one that names its line; only a row's text is
    decoded, long after it was read."""
    try:
        yield
    except UnicodeDecodeError as error:
        for name in files_of(source) or ():
            if FORMATS[ending_of(name)] == "json" and (wrong := find_wrong_line(name)):
                raise ValueError(f"{name!r}, {wrong}") from error
        raise ValueError(f"{source!r}: it is not UTF-8; save it as UTF-8") from error


def _locate_row(source: str | list[str], split: str, index: int) -> str:
    """Return the place of a row for messages: its file and line there, or its number from 0."""
    whole = f"{source!r}, row {index}" + (f" of {split}" if "[" in split else "")
    files = files_of(source)
    if files is None or "[" in split:
        return whole
    for name in files:
        count = len(_load_files([name], split)) if len(files) > 1 else index + 1
        if index < count:
            return f"{name!r}, {find_line(name, index)}"
        index -= count
    return whole


def tokenize(rows: Any, function: Any) -> Any:
    """Return the samples `function(row, index)` of all rows, cached by `datasets` as long as rows,
    function and the code of `ds_kd.data` are the same.

    `sample_id` is the row's own `id` or `ind` if it has one, else its index.
    """
    id_column = next((name for name in ("id", "ind") if name in rows.column_names), None)

    def sample(row: dict[str, Any], index: int, made_by: str = "") -> dict[str, Any]:
        own = row[id_column] if id_column is not None else None
        return {**function(row, index), "sample_id": str(index if own is None else own)}

    # Try some rows first, so that a bad one among them is reported at once, not after hours.
    first, spread = range(min(len(rows), _FIRST)), random.Random(0)
    for index in [*first, *spread.sample(range(len(rows)), min(len(rows), _FIRST))]:
        sample(rows[index], index)
    workers = min(4, os.cpu_count() or 1) if len(rows) >= _MULTIPROCESS_FROM else None
    return rows.map(
        sample,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=workers,
        fn_kwargs={"made_by": hash_code(_CODE)},
    )


@functools.cache
def hash_code(directory: Path) -> str:
    """Return a hash of the code that makes samples: the files of a directory, and the versions of
    the libraries that render and tokenise.

    `datasets` knows a function of a module by its name alone, and would return what an earlier
    version of it has made.
    """
    sha = hashlib.sha256()
    for name in ("transformers", "tokenizers", "jinja2"):
        sha.update(f"{name} {version(name)} ".encode())
    for path in sorted(directory.rglob("*.py")):
        if path.is_file():  # and no lock of an editor, a link that leads nowhere
            sha.update(f"{path.relative_to(directory)} ".encode() + path.read_bytes())
    return sha.hexdigest()[:16]
