"""Where rows come from: the hub, a local file, or a directory."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from ds_kd.errors import first_line

#: Columns that the data sets need.
SQUAD = ("context", "question", "answers")
HELLASWAG = ("ctx", "endings", "label")
CHAT = ("messages",)

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FIRST = 16  # rows tried before all of them, and as many random ones
_MULTIPROCESS_FROM = 20_000  # rows; below, starting processes costs more than it saves


def load_rows(source: str, split: str, columns: tuple[str, ...], limit: int | None = None) -> Any:
    """Rows of one split as a `datasets.Dataset`.

    Args:
        source: a local .json, .jsonl or .parquet file (it serves whatever split is named), a
            directory of splits or one written by `save_to_disk`, or a hub id.
        split: `train`, or a slice such as `train[:100]`.
        columns: that the rows must have.
        limit: keep the first so many rows.

    Raises:
        ValueError: nothing there, not readable, no such split, columns missing, no rows; names the
            source.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"the sample limit must be an integer ≥ 1, got {limit!r}")
    try:
        rows = _load(source, split)
    # datasets raises its own kinds for bad content, unknown splits and a missing network
    except Exception as error:
        raise ValueError(f"{source!r}, split {split!r}: {_reason(error)}") from error
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


def _load(source: str, split: str) -> Any:
    import datasets

    path = Path(source)
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        files = {split.split("[")[0]: str(path)}
        return datasets.load_dataset(FORMATS[path.suffix], data_files=files, split=split)
    if (path / "dataset_dict.json").is_file():
        return _slice(datasets.load_from_disk(path), split)
    if (path / "state.json").is_file():
        return _slice({split.split("[")[0]: datasets.load_from_disk(path)}, split)
    if not path.is_dir() and (
        path.is_absolute() or source.startswith(".") or source.count("/") > 1
    ):
        raise FileNotFoundError(
            "no such file or directory; give a .json, .jsonl or .parquet file, or a hub id"
        )
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
    """`train`, `train[:10]` or `train[10%:]` of data sets that are already open."""
    import datasets

    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _reason(error: BaseException) -> str:
    """One line. `datasets` wraps what was wrong in an error that only says that there was one."""
    while type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "no rows"
    return first_line(error)


def text_of(row: dict[str, Any], column: str) -> str:
    """A row's text.

    Raises:
        ValueError: there is none.
    """
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, expected text")
    return value


def squad_texts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return context, question and the first answer, stripped, empty where there is none.

    Raises:
        ValueError: one of them is not text.
    """
    context, question, answers = text_of(row, "context"), text_of(row, "question"), row["answers"]
    try:
        texts = answers["text"]
        if isinstance(texts, str):  # whose first item would be a letter
            raise TypeError
        return context, question, str(texts[0].strip()) if texts else ""
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"answers is {answers!r}, expected {{'text': [text, …]}}") from None


def hellaswag_texts(row: dict[str, Any]) -> tuple[str, str]:
    """Return the context and the right ending.

    Raises:
        ValueError: one of them is not text, or the label names no ending.
    """
    try:
        label = int(row["label"])
        if label < 0:  # a test split may carry -1, which Python would read as the last ending
            raise IndexError
        ending = row["endings"][label]
    except (ValueError, TypeError, IndexError):
        count = len(row["endings"]) if isinstance(row["endings"], list) else "no"
        raise ValueError(
            f"label {row['label']!r} names none of {count} endings (a test split has no labels)"
        ) from None
    return text_of(row, "ctx"), text_of({"ending": ending}, "ending")


def tokenize(rows: Any, function: Any) -> Any:
    """`function(row, index) -> sample` over all rows, cached by `datasets`.

    `sample_id` is the row's own `id` or `ind` where it has one, else its index.
    """
    id_column = next((name for name in ("id", "ind") if name in rows.column_names), None)

    def sample(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**function(row, index), "sample_id": str(row[id_column] if id_column else index)}

    # A bad row is told at once where it is among these, not after hours of good ones.
    first, spread = range(min(len(rows), _FIRST)), random.Random(0)
    for index in [*first, *spread.sample(range(len(rows)), min(len(rows), _FIRST))]:
        sample(rows[index], index)
    workers = min(4, os.cpu_count() or 1) if len(rows) >= _MULTIPROCESS_FROM else None
    return rows.map(sample, with_indices=True, remove_columns=rows.column_names, num_proc=workers)
