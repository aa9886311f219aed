"""Read rows of CSV and TSV, and tell quotation marks that do not pair up: lenient readers join the
rows between them, or leave marks out, without a word."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import islice

csv.field_size_limit(1 << 27)  # the reader of `datasets` has no limit
_REMEDY = (
    'double each " inside a quoted cell ("…""…"), put a cell that begins with " in quotes as a '
    "whole, or save the rows as .jsonl"
)
_NEVER_CLOSED = "unexpected end of data"  # the words of Python's reader
_WRONG = {
    _NEVER_CLOSED: 'a cell opens with ", which nothing closes',
    "expected after": 'a cell opens with ", and more text follows the " that closes it',
    "larger than field limit": 'a cell opens with ", which nothing closes within 128 MiB',
}


def open_table(text: str, delimiter: str) -> csv.DictReader:
    """Return a reader of the rows of a text, by column; cells that a row lacks are empty."""
    file = io.StringIO(text, newline="")
    return csv.DictReader(file, delimiter=delimiter, restval="", strict=True)


def read_names(table: csv.DictReader) -> list[str]:
    """Return the names of the columns.

    Raises:
        ValueError: the first line is no CSV.
    """
    try:
        return [*(table.fieldnames or ())]
    except csv.Error as error:
        raise ValueError(f"line 1: {_describe(error)}") from None


def read_table(
    table: csv.DictReader, is_whole: bool, line: int, most: int
) -> Iterator[tuple[object, dict]]:
    """Yield (place, row) of the first rows of CSV; the last one of a part may have been cut."""
    waiting: tuple[object, dict] | None = None
    names = read_names(table)  # this reads the first line
    start = table.line_num + line
    try:
        for row in islice(table, most):
            if waiting is not None:
                yield waiting
            if len(row) > len(names):
                raise ValueError(f"line {start} has more cells than there are columns")
            waiting, start = (f"line {start}", row), table.line_num + line
    except csv.Error as error:
        if is_whole or _NEVER_CLOSED not in str(error):
            raise ValueError(f"line {start}: {_describe(error)}") from None
        is_whole = True  # the row that was cut is not the one that waits
    if waiting is not None and is_whole:
        yield waiting


def _describe(error: csv.Error) -> str:
    """Return what is wrong with a row, and what to do."""
    found = next((told for words, told in _WRONG.items() if words in str(error)), None)
    return f"not CSV: {error}" if found is None else f"{found}; {_REMEDY}"


def find_wrong_quote(lines: Iterable[str], delimiter: str, is_whole: bool) -> str:
    """Return the problem of the first row whose quotes do not pair up, or an empty text.

    Args:
        lines: of the file, with their ends.
        is_whole: whether they are all lines of it.
    """
    reader, start = csv.reader(lines, delimiter=delimiter, strict=True), 1
    try:
        for _ in reader:
            start = reader.line_num + 1
    except csv.Error as error:
        if (not is_whole and _NEVER_CLOSED in str(error)) or not any(
            w in str(error) for w in _WRONG
        ):
            return ""
        return f"line {start}: {_describe(error)}"
    return ""
