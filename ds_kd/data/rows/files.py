"""Local files of rows: find them, and read their columns and some rows without reading all."""

from __future__ import annotations

import codecs
import csv
import functools
import glob
import gzip
import io
import json
import os
import random
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ds_kd.data.rows.decoder import DECODER
from ds_kd.data.rows.frames import read_frames
from ds_kd.data.rows.tables import find_wrong_quote, open_table, read_names, read_table
from ds_kd.errors import first_line

#: Ending of a file's name → the reader of `datasets`.
FORMATS = {
    ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
ENDINGS = "a .json, .jsonl, .csv, .tsv or .parquet file (text also as .gz or .zst)"
BEGINNING = 1 << 22  # bytes read of a file to find its first rows
_LONGEST = 1 << 27  # bytes read if its first row is longer than that
_MANY = 20_000  # rows looked at in that beginning
_FEW = 16  # of them at least, where there are many files
_PLACES = 64  # random places of a longer file whose rows are looked at too


def ending_of(name: str) -> str:
    """Return the ending of a file's name that tells its format, or an empty text."""
    path = Path(name.lower())
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    is_text = path.suffix not in COMPRESSIONS or inner.suffix != ".parquet"
    return inner.suffix if inner.suffix in FORMATS and is_text else ""


def files_of(source: Any) -> list[str] | None:
    """Return the local files that a data set's source names, or None for a directory or a hub id.

    Args:
        source: a file, a pattern such as `rows/*.jsonl`, or a list of these.

    Raises:
        ValueError: a file does not exist, a pattern matches none, formats differ, or the source is
            of another type.
    """
    if isinstance(source, str):
        if not ending_of(source) and not _is_pattern(source):
            return None
        names = _find_files(source)
    elif isinstance(source, list) and source and all(isinstance(name, str) for name in source):
        names = [path for name in source for path in _find_files(name)]
    else:
        raise ValueError(f"it is {source!r:.80}, expected a file, a pattern or a list of files")
    for name in names:
        if not ending_of(name):
            raise ValueError(f"{name} is not {ENDINGS}")

    # A file may be spelt in several ways; of links to one file each counts.
    once: set[str] = set()
    for name in names:
        if (plain := os.path.abspath(name)) in once:
            raise ValueError(f"{name} is named twice")
        once.add(plain)
    formats = {ending_of(name): name for name in names}
    if len({FORMATS[ending] for ending in formats}) > 1 or {".csv", ".tsv"} <= set(formats):
        raise ValueError(f"the files have several formats: {', '.join(formats.values())}")
    return names


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[") and not Path(name).exists()


def _find_files(name: str) -> list[str]:
    """Return the files of one entry; a pattern's are sorted, so that all ranks have one order."""
    if not _is_pattern(name):
        if not Path(name).is_file():
            raise ValueError(f"no such file: {name}")
        return [name]
    found = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
    if not found:
        raise ValueError(f"no file matches {name}")
    return found


def columns_of(path: str | Path) -> list[str]:
    """Return the columns of a file's first row.

    Raises:
        ValueError: there are no rows, or its content has another format than its name.
        OSError: it cannot be read.
    """
    if ending_of(str(path)) == ".parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if FORMATS[ending_of(str(path))] == "csv":
        names = read_names(open_table(read_beginning(path)[0], _find_delimiter(path)))
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {twice[0]} stands twice in it")
        return names

    # The first row of JSON may be longer than the part that is read of a large file.
    text, is_whole, _ = read_beginning(path)
    try:
        try:
            row, _ = DECODER.raw_decode(text)
        except ValueError:
            if is_whole:
                raise
            row, _ = DECODER.raw_decode(read_beginning(path, _LONGEST)[0])
    except ValueError as error:
        raise ValueError(f"its first row: {_describe_error(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"its first row is {type(row).__name__}, not a mapping of columns")
    return list(row)


def sample_rows(
    path: str | Path, most: int | None = None, files: int = 1
) -> Iterator[tuple[object, dict]]:
    """Yield (place, row) of the rows at the beginning of a file, and of some at random places.

    They are the same rows each time. A file below 4 MiB gives all its rows, up to 20,000. Little
    of a larger file is read: random rows are looked up in files with a row on each line, and in the
    row groups of parquet.

    Args:
        most: yield only the first rows, at most this many.
        files: number of files of the data set; many of them share the number of rows.

    Raises:
        ValueError: a row has another format than the file's name.
    """
    ending, few = ending_of(str(path)), max(_FEW, _MANY // files)
    few = min(few, few if most is None else most)
    if ending == ".parquet":
        yield from _read_parquet_rows(path, few, most is None)
        return
    text, is_whole, line = read_beginning(path)
    if FORMATS[ending] == "csv":
        table = open_table(text, _find_delimiter(path))
        yield from read_table(table, is_whole, line, few)
        return
    is_all = yield from _read_json_rows(text, is_whole, line, few)
    is_plain = Path(path).suffix.lower() not in COMPRESSIONS
    if most is None and is_plain and not is_all and _has_lines(text):
        yield from _sample_lines(Path(path), _PLACES if files == 1 else _FEW)


def read_beginning(path: str | Path, most: int = BEGINNING) -> tuple[str, bool, int]:
    """Return the text at a file's beginning, whether it is the whole file, and the number of the
    line in which the text begins: a bracket and space before the first row are left out.

    Raises:
        ValueError: the file is empty, in another encoding, or not compressed as its name says.
    """
    try:
        with _open(path) as file:
            content = file.read(most)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"not compressed as its name says: {error}") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is encoded in UTF-16; save it as UTF-8")
    is_whole = len(content) < most
    try:
        whole = content.decode("utf-8-sig", errors="strict" if is_whole else "ignore")
    except UnicodeDecodeError as error:
        raise ValueError(_describe_error(error)) from None
    if not (text := whole.lstrip()):
        raise ValueError("the file is empty")
    if text[0] == "[":
        text = text[1:].lstrip()
    return text, is_whole, 1 + whole.count("\n", 0, len(whole) - len(text))


def _open(path: str | Path) -> IO[bytes]:
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BytesIO(read_frames(path, _LONGEST))
    return open(path, "rb")


def _find_delimiter(path: str | Path) -> str:
    return "\t" if ending_of(str(path)) == ".tsv" else ","


def _read_json_rows(
    text: str, is_whole: bool, line: int, most: int
) -> Generator[tuple[object, dict], None, bool]:
    """Yield (place, row) of the first rows of JSON text, and return whether they are all there is.

    Args:
        line: the number of the line in which the text begins.
        most: number of rows.
    """
    at = seen = 0
    for _ in range(most):
        line, seen = line + text.count("\n", seen, at), at
        try:
            row, at = DECODER.raw_decode(text, at)
        except ValueError as error:
            told = _describe_error(error, at)
            alone, ends, _ = text[at:].partition("\n")
            if ends and _has_lines(text):
                told = _describe_line(alone) or told
            elif not is_whole:  # the text may have been cut inside this row
                return False
            raise ValueError(f"line {line}: {told}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {line} is {type(row).__name__}, not a mapping of columns")
        yield f"line {line}", row

        # Rows stand one on a line, or in an array with commas between them.
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if at == len(text) or text[at] == "]":
            return is_whole
    return False


def _has_lines(text: str) -> bool:
    """Return whether each row has its own line, judged by the first line."""
    try:
        return isinstance(json.loads(text.partition("\n")[0]), dict)
    except ValueError:
        return False


def _describe_line(line: str) -> str:
    """Return why a line is no JSON, or an empty text."""
    try:
        DECODER.decode(line)
    except ValueError as error:
        return _describe_error(error)
    return ""


def _sample_lines(path: Path, places: int) -> Iterator[tuple[object, dict]]:
    """Yield (place, row) of the rows behind random places of a file with a row on each line."""
    size, chosen, left = path.stat().st_size, random.Random(0), 16 * BEGINNING
    with path.open("rb") as file:
        for offset in sorted(chosen.randrange(size) for _ in range(places)):
            file.seek(offset)
            file.readline(BEGINNING)
            start, line = file.tell(), file.readline(BEGINNING)
            if (left := left - len(line)) < 0:  # rows this long would take too much time
                return
            if not line.strip() or (len(line) == BEGINNING and not line.endswith(b"\n")):
                continue
            try:
                row = DECODER.decode(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is {type(row).__name__}, not a mapping of columns")
            except ValueError as error:
                raise ValueError(f"{_Line(path, start)}: {_describe_error(error)}") from None
            yield _Line(path, start), row


@dataclass(frozen=True)
class _Line:
    """The line that begins at an offset. The lines before it are counted only for a message."""

    path: Path
    offset: int

    def __str__(self) -> str:
        left, number = self.offset, 1
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, BEGINNING))):
                number += block.count(b"\n")
                left -= len(block)
        return f"line {number}"


def _describe_error(error: ValueError, start: int = 0) -> str:
    """Return a decoder's error, with the character's place counted from the row's start."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} is not of UTF-8; save the file as UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return first_line(error)
    return f"not JSON: {error.msg} (character {error.pos - start + 1} of it)"


def find_wrong_line(path: str | Path) -> str:
    """Return the problem of the first bad line of a file of JSON, or an empty text. Reads a file
    with a row on each line up to that line, and little of one that is an array."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                content = line.removeprefix(codecs.BOM_UTF8).strip()
                if number == 1 and content[:1] != b"{":
                    break  # an array, or not JSON at all
                try:
                    row = DECODER.decode(content.decode()) if content else {}
                except RecursionError:
                    return f"line {number}: nested too deeply"
                except ValueError as error:
                    return f"line {number}: {_describe_error(error)}"
                if not isinstance(row, dict):
                    return f"line {number} is {type(row).__name__}, not a mapping of columns"
            else:
                return ""

        # The rows of an array are read from its beginning, as the whole may not fit into memory.
        for _ in sample_rows(path):
            pass
    except (OSError, EOFError, zlib.error, ValueError) as error:
        return str(error)
    return ""


def find_wrong_cell(path: str | Path) -> str:
    """Return the problem of the first row of CSV whose quotes do not pair up, or an empty text; all
    rows are read, once in a process."""
    state = os.stat(path)
    return _find_wrong_cell(str(path), state.st_size, state.st_mtime_ns)


@functools.cache
def _find_wrong_cell(path: str, *_: int) -> str:
    with _open(path) as file:
        is_whole = not isinstance(file, io.BytesIO) or file.getbuffer().nbytes < _LONGEST
        lines = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
        return find_wrong_quote(lines, _find_delimiter(path), is_whole)


def find_line(path: str | Path, index: int) -> str:
    """Return the place of a file's row for messages: the line in which it begins, or where there is
    none (parquet, far down an array) its number, counted from 0."""
    kind = FORMATS[ending_of(str(path))]
    places: Iterator[object] = iter(())
    with _open(path) as file:
        if kind == "csv":
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            reader = csv.reader(text, delimiter=_find_delimiter(path))
            starts = (reader.line_num for row in reader if row)  # the next row's, less one
            places = (f"line {number + 1}" for number in starts)
            return str(next(islice(places, index, None), f"row {index}"))
        if kind == "json" and file.read(4).removeprefix(codecs.BOM_UTF8)[:1] == b"{":
            file.seek(0)
            places = (f"line {number}" for number, line in enumerate(file, 1) if line.strip())
            return str(next(islice(places, index, None), f"row {index}"))
    if kind == "json":
        places = (place for place, _ in sample_rows(path, index + 1))
    return str(next(islice(places, index, None), f"row {index}"))


def _open_parquet(path: str | Path) -> Any:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(first_line(error)) from None


def _read_parquet_rows(path: str | Path, few: int, anywhere: bool) -> Iterator[tuple[object, dict]]:
    """Yield (place, row) of the first rows and, if the file has row groups, of a random group."""
    file = _open_parquet(path)
    groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
    chosen = [0, *({random.Random(0).randrange(len(groups))} if anywhere else ())]
    for group in dict.fromkeys(chosen) if groups else ():
        start = sum(before.num_rows for before in groups[:group])
        size = groups[group].total_byte_size // max(1, groups[group].num_rows)
        most = min(few, max(_FEW, BEGINNING // max(1, size)))
        batch = next(file.iter_batches(batch_size=most, row_groups=[group]), None)
        for index, row in enumerate(batch.to_pylist() if batch is not None else ()):
            yield f"row {start + index}", row
