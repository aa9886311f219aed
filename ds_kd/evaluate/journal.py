"""The records of an evaluation on disk, so that one that is killed goes on where it stopped.

Beside `results.json` stands the folder `results.samples`. Each rank appends its records to a file
of its own there, one JSON object a line, whose name begins with a fingerprint of everything that
decides them: the model's files, its dtype, the task and the tokens of all samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from ds_kd.files import name_path


def fingerprint(*parts: Any) -> str:
    """Return a short hash of values that JSON can hold."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(json.dumps(part, sort_keys=True, ensure_ascii=True).encode())
    return sha.hexdigest()[:16]


class Journal:
    """The records of one model on one task.

    Args:
        folder: where they are kept; None keeps none.
        key: their fingerprint.
        title: told in each file's first line, for whoever reads it.
        rows: the row of each item.
        rank: this process.
    """

    def __init__(
        self, folder: Path | None, key: str, title: dict[str, Any], rows: list[int], rank: int
    ):
        self.folder, self.key, self.title, self.rank = folder, key, title, rank
        self.rows = rows
        self._file: TextIO | None = None

    def read(self) -> dict[int, dict[str, Any]]:
        """Return the records that any earlier evaluation of this fingerprint left, by item."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.key}.*.jsonl")) if self.folder else ():
            for line in path.read_text("utf-8", errors="replace").splitlines():
                try:
                    read = json.loads(line)
                    found[int(read["item"])] = dict(read["record"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # the first line, or one that a kill has torn
        return found

    def add(self, records: dict[int, dict[str, Any]]) -> None:
        """Append records; they are on the disk when this returns.

        Raises:
            OSError: they cannot be written; names the file.
        """
        if self.folder is None:
            return
        file = self._open(self.folder) if self._file is None else self._file
        with name_path(Path(file.name)):
            for item, record in records.items():
                line = {"row": self.rows[item], "item": item, "record": record}
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _open(self, folder: Path) -> TextIO:
        folder.mkdir(parents=True, exist_ok=True)
        file = self._file = (folder / f"{self.key}.{self.rank}.jsonl").open("a", encoding="utf-8")
        if file.tell():
            file.write("\n")  # ends a line that a kill has torn
        else:
            file.write(json.dumps(self.title) + "\n")
        return file

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
