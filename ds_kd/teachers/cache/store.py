"""Rows on disk: a directory of safetensors files, each written whole, with an index in memory.

A file has `keys` `[rows, 2]`, `checksums` `[rows]` and the rows' fields, such as `hidden`
`[rows, hidden]`. Files are memory-mapped, and only rows that are asked for are read. Several ranks,
and several runs, may write into one directory: a file is renamed into place when it is complete,
and a row that is there twice is the same row.
"""

from __future__ import annotations

import os
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_kd.errors import UserError, first_line
from ds_kd.files import give_usual_mode
from ds_kd.writing import write_whole

#: The most that is lost when a process that fills a cache is killed.
_PART_BYTES, _PART_SECONDS = 64 * 2**20, 60.0
#: Bytes of a row beside its fields: its key and its checksum.
ROW_OVERHEAD = 24
_PATTERN = "part-*.safetensors"

Fields = dict[str, Tensor]


class CacheError(UserError):
    """A cache is damaged or lacks what is asked of it; the message says what to do."""


class CacheWriteError(CacheError, OSError):
    """The system cannot write a file of a cache."""


@dataclass(frozen=True)
class _Part:
    """A file of rows, or rows that are not yet in one (`path` None)."""

    path: Path | None
    keys: np.ndarray
    checksums: Tensor
    fields: Fields


class _Index:
    """The places of keys in parts, found by bisection."""

    def __init__(self, parts: list[tuple[int, np.ndarray]]):
        keys = np.concatenate([np.empty((0, 2), np.uint64), *(found for _, found in parts)])
        order = np.argsort(keys[:, 0], kind="stable")
        self._first, self._second = keys[order, 0], keys[order, 1]
        numbers = [np.full(len(found), number) for number, found in parts]
        places = [np.arange(len(found)) for _, found in parts]
        empty = [np.empty(0, np.int64)]
        self._parts = np.concatenate(empty + numbers)[order]
        self._places = np.concatenate(empty + places)[order]

    def __len__(self) -> int:
        return len(self._first)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the part, -1 for none, and the place in it of each key."""
        if not len(self):
            return np.full(len(keys), -1), np.zeros(len(keys), np.int64)
        at = np.searchsorted(self._first, keys[:, 0]).clip(max=len(self) - 1)
        is_there = (self._first[at] == keys[:, 0]) & (self._second[at] == keys[:, 1])
        return np.where(is_there, self._parts[at], -1), self._places[at]


class Store:
    """The rows of a directory, and those that this process adds.

    Args:
        directory: need not exist before rows are added.

    Raises:
        CacheError: a file is damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._parts: list[_Part] = []
        self._indices: list[_Index] = []
        self._flushed = time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        """Take in the files that other processes have written, beside those known."""
        known = {part.path for part in self._parts}
        paths = [p for p in sorted(self.directory.glob(_PATTERN)) if p not in known]
        self._parts += [_open(path) for path in paths]
        if paths or len(self._indices) != 1:
            self._indices = [_Index([(k, part.keys) for k, part in enumerate(self._parts)])]

    def __len__(self) -> int:
        """Return the number of rows, repeated ones included."""
        return sum(map(len, self._indices))

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts, places = np.full(len(keys), -1), np.zeros(len(keys), np.int64)
        for index in self._indices:
            missing = parts < 0
            if not missing.any():
                break
            parts[missing], places[missing] = index.find(keys[missing])
        return parts, places

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """Return whether each row is absent, `[rows]` bool."""
        return self._find(keys)[0] < 0

    def read(self, keys: np.ndarray) -> Fields:
        """Return the fields of rows, in the order of their keys, those of new files too.

        Raises:
            CacheError: a row is absent, or its checksum is wrong.
        """
        parts, places = self._find(keys)
        if (parts < 0).any():  # another run may have written them since
            self.refresh()
            parts, places = self._find(keys)
        if (parts < 0).any():
            raise CacheError(
                f"{self.directory}: lacks {int((parts < 0).sum())} of {len(keys)} rows of a "
                f"micro-batch; python launch/cache_teacher.py adds what is missing"
            )

        # A row's file is known, so that each file is looked into once.
        found: Fields = {}
        for number in np.unique(parts).tolist():
            part, rows = self._parts[number], torch.from_numpy(np.flatnonzero(parts == number))
            at = torch.from_numpy(places[rows.numpy()])
            fields = {name: value[at] for name, value in part.fields.items()}
            _check(part, fields, part.checksums[at])
            for name, value in fields.items():
                if name not in found:
                    found[name] = value.new_empty((len(keys), *value.shape[1:]))
                found[name][rows] = value
        return found

    def add(self, keys: np.ndarray, fields: Fields) -> None:
        """Add the rows that are absent. They are written by the first call after a minute, or when
        they fill a file; `flush` writes them at once.

        Args:
            keys: `[rows, 2]`; some may be equal.
            fields: `[rows, …]` each, on the CPU.

        Raises:
            CacheWriteError: they cannot be written.
        """
        absent = np.flatnonzero(self.lacks(keys))
        _, first = np.unique(keys[absent], axis=0, return_index=True)
        rows = absent[np.sort(first)]
        if not len(rows):
            return
        at = torch.from_numpy(rows)
        chosen = {name: value[at].contiguous() for name, value in fields.items()}
        part = _Part(None, keys[rows].copy(), _sum_up(chosen), chosen)
        self._parts.append(part)
        self._indices.append(_Index([(len(self._parts) - 1, part.keys)]))
        waited = time.monotonic() - self._flushed
        if self._count_unwritten() >= _PART_BYTES or waited >= _PART_SECONDS:
            self.flush()

    def _count_unwritten(self) -> int:
        new = (part for part in self._parts if part.path is None)
        return sum(v.numel() * v.element_size() for part in new for v in part.fields.values())

    def flush(self) -> None:
        """Write what was added into a file of its own.

        Raises:
            CacheWriteError: it cannot be written.
        """
        self._flushed = time.monotonic()
        new = [part for part in self._parts if part.path is None]
        if not new:
            return
        fields = {name: torch.cat([part.fields[name] for part in new]) for name in new[0].fields}
        keys = np.concatenate([part.keys for part in new])
        written = {
            **fields,
            "keys": torch.from_numpy(keys.view(np.int64)),
            "checksums": torch.cat([part.checksums for part in new]),
        }
        path = self.directory / f"part-{uuid.uuid4().hex}.safetensors"
        write_file(path, written)
        self._parts = [*(part for part in self._parts if part.path is not None), _open(path)]
        self._indices = [_Index([(k, part.keys) for k, part in enumerate(self._parts)])]


def write_file(path: Path, tensors: Fields) -> None:
    """Write a safetensors file that is whole or absent, whenever the process ends.

    Raises:
        CacheWriteError: it cannot be written.
    """
    try:
        with write_whole(path) as unfinished:
            save_file(tensors, unfinished)
            give_usual_mode(unfinished)
    except (OSError, SafetensorError) as error:
        raise CacheWriteError(f"{path}: cannot be written: {first_line(error)}") from error


def _open(path: Path) -> _Part:
    """Return a file's rows, mapped and not read."""
    try:
        with safe_open(path, "pt") as file:
            fields = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        keys = fields.pop("keys").numpy().view(np.uint64)
        return _Part(path, keys, fields.pop("checksums"), fields)
    except (OSError, SafetensorError, KeyError) as error:
        if path.exists() and not os.access(path, os.R_OK):  # safetensors calls such a file absent
            raise CacheError(
                f"{path}: this user may not read this file of the cache; chmod a+r permits it"
            ) from error
        raise _make_damage_error(path) from error


def _make_damage_error(path: Path | None) -> CacheError:
    return CacheError(
        f"{path}: this file of the cache is damaged; delete it, and python "
        f"launch/cache_teacher.py writes its rows again"
    )


def _sum_up(fields: Fields) -> Tensor:
    """Return the CRC-32 of each row over its fields, `[rows]` int64."""
    sums = [0] * len(next(iter(fields.values())))
    for name in sorted(fields):
        raw = fields[name].contiguous().flatten(1).view(torch.uint8).numpy()
        sums = [zlib.crc32(row, before) for row, before in zip(raw, sums, strict=True)]
    return torch.tensor(sums, dtype=torch.int64)


def _check(part: _Part, fields: Fields, expected: Tensor) -> None:
    if not torch.equal(_sum_up(fields), expected):
        raise _make_damage_error(part.path)
