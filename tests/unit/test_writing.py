"""Files are whole or absent, and what killed writers leave is cleared by the next one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_kd import writing
from ds_kd.evaluate.journal import Journal
from ds_kd.teachers.cache.store import Store
from ds_kd.writing import write_directory, write_text, write_whole
from tests.unit.test_cache import make_rows

ROOT = Path(__file__).parents[2]
#: Writes half of a file, says so, and waits.
HALF = """
import sys, time
from pathlib import Path
from ds_kd.writing import write_whole
with write_whole(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("half")
    unfinished.with_name(".tmpAbCdEf").write_text("a library's own")
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writers():
    """Start processes that are in the middle of writing a file; those left are killed."""
    started = []

    def start(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HALF, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "written\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_next_writer_clears_what_a_killed_one_left_and_leaves_a_live_ones_file(
    tmp_path, writers
):
    dead, live = writers(tmp_path / "a.txt"), writers(tmp_path / "b.txt")
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(names(tmp_path)) == 2  # and no file yet
    write_text(tmp_path / "c.txt", "whole")
    assert names(tmp_path) == {"c.txt", *(n for n in names(tmp_path) if f"-{live.pid}-" in n)}
    assert len(names(tmp_path)) == 2
    live.kill()
    live.wait()

    # A cache's rows are such files too.
    keys, fields = make_rows(4)
    store = Store(tmp_path)
    store.add(keys, fields)
    store.flush()
    (part,) = tmp_path.glob("part-*.safetensors")
    assert names(tmp_path) == {"c.txt", part.name}
    assert torch.equal(Store(tmp_path).read(keys)["hidden"], fields["hidden"])


def test_a_number_that_another_process_has_by_now_is_not_the_writers(tmp_path):
    with write_whole(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("a")
        folder = unfinished.parent.name
    start = folder.split("-")[3]
    (tmp_path / folder.replace(f"-{start}-", f"-{int(start) - 1}-")).mkdir()
    write_text(tmp_path / "b.txt", "b")
    assert names(tmp_path) == {"a.txt", "b.txt"}


def test_the_file_of_a_process_of_which_the_system_tells_nothing_is_left(tmp_path, monkeypatch):
    """As of other users', where /proc is mounted with `hidepid`."""

    def refuse(*_):
        raise PermissionError

    folder = tmp_path / f".writing-{writing._hash_machine()}-{2**22 - 3}-7-{'0' * 8}"
    folder.mkdir()
    monkeypatch.setattr(writing.os, "kill", refuse)
    write_text(tmp_path / "a.txt", "a")
    assert names(tmp_path) == {"a.txt", folder.name}
    monkeypatch.undo()
    write_text(tmp_path / "a.txt", "a")
    assert names(tmp_path) == {"a.txt"}


def test_a_directory_is_whole_or_absent_and_replaces_nothing(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(RuntimeError), write_directory(out) as unfinished:
        unfinished.mkdir()
        (unfinished / "half").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == set()
    for other in (lambda: out.mkdir(), lambda: (out / "mine").write_text("mine")):
        with pytest.raises(FileExistsError, match="model"), write_directory(out) as unfinished:
            unfinished.mkdir()
            other()
    assert names(tmp_path) == {"model"} and names(out) == {"mine"}
    with write_directory(tmp_path / "deep" / "model") as unfinished:
        unfinished.mkdir()
        (unfinished / "weights").write_text("whole")
        assert names(tmp_path) == {"model", "deep"} and not (tmp_path / "deep/model").exists()
    assert names(tmp_path / "deep") == {"model"} and names(tmp_path / "deep/model") == {"weights"}


def test_another_machines_remains_are_cleared_after_a_day_without_a_change(tmp_path):
    folders = [tmp_path / f".writing-{'ab' * 6}-{pid}-7-{'0' * 8}" for pid in (1, 2, 3)]
    for folder in folders:
        (folder / "model").mkdir(parents=True)
        for name in ("a.txt", "model/weights"):
            (folder / name).write_text("half")
        for path in (folder / "a.txt", folder / "model/weights", folder / "model", folder):
            os.utime(path, (time.time() - 3 * 86400,) * 2)
    for number, name in ((1, "a.txt"), (2, "model/weights")):
        os.utime(folders[number] / name)  # it is being written
    write_text(tmp_path / "b.txt", "b")
    assert names(tmp_path) == {"b.txt", folders[1].name, folders[2].name}


def test_nothing_else_is_cleared(tmp_path):
    """A user's own hidden files, links, and files where a folder is expected."""
    own = f".writing-{'ab' * 6}-1-7-{'0' * 7}"
    (tmp_path / ".writing-notes").mkdir()
    (tmp_path / f"{own}1").symlink_to(tmp_path / ".writing-notes")
    (tmp_path / f"{own}2").write_text("a file")
    os.utime(tmp_path / f"{own}2", (0, 0))
    os.utime(tmp_path / ".writing-notes", (0, 0))
    before = names(tmp_path)
    write_text(tmp_path / "b.txt", "b")
    assert names(tmp_path) == {*before, "b.txt"}


def test_a_file_that_cannot_be_written_is_named_and_nothing_stays(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        with pytest.raises(OSError, match=r"File too large: '.*/a\.txt'"):
            write_text(tmp_path / "a.txt", "x" * (1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == {"a.txt"} and (tmp_path / "a.txt").read_text() == "before"


def test_records_on_a_full_disk_are_named(tmp_path):
    (tmp_path / "key.0.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, "key", {"teacher": "t"}, [0], 0)
    with pytest.raises(OSError, match=r"No space left on device: '.*/key\.0\.jsonl'"):
        journal.add({0: {"tokens": [1]}})
