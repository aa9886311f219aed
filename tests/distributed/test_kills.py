"""A run killed between any two file operations of its last save ends, started again, as if nothing
had happened.

SIGKILL leaves the files as they are: a copy of the directory taken before an operation is what a
kill at that point leaves. So one launch sees every such state, and goes on from each of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import threading

import pytest

from tests import tiny
from tests.distributed.test_checkpoint import adam, same
from tests.parity.test_step import build, weights
from tests.ranks import run_ranks

STEPS = 4
WRITING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}


def trainer(world, paths, directory, consolidates, steps=STEPS):
    from ds_kd.checkpoint.checkpointer import Checkpointer
    from ds_kd.checkpoint.retention import Retention
    from ds_kd.checkpoint.writer import Writer

    made = build(
        world, paths, tiny.samples(11, seed=5), 1, 2, 0.5, adam,
        num_epochs=9, max_steps=steps, ckpt_every_steps=2,
    )  # fmt: skip
    made.checkpointer = Checkpointer(
        directory,
        Writer(world, tiny.tokenizer(directory.parent / f"tokenizer{world.rank}")),
        consolidates,
        Retention(last=1, best=0),
        say=lambda *_: None,
    )
    return made


def state_of(directory):
    """Return what a reader sees; of what is written aside, that it is there."""
    seen = []
    for path in sorted(directory.iterdir()):
        seen.append(f"{path.name} {path.readlink() if path.is_symlink() else ''}")
        if path.name == "final" and (file := path / "model.safetensors").exists():
            seen.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return "\n".join(seen)


class Snapshots:
    """Copies of a directory as this process's file operations find it, each state once."""

    def __init__(self, directory, out):
        self.directory, self.out = directory, out
        self.taken: dict[str, str] = {}  # state → name of its copy
        self.on, self.main = False, threading.get_ident()
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on or event not in WRITING or threading.get_ident() != self.main:
            return
        self.on = False
        try:
            with contextlib.suppress(OSError):  # the other rank writes aside meanwhile
                state = state_of(self.directory)
                if state not in self.taken:
                    self.taken[state] = self.out / f"killed{len(self.taken)}"
                    shutil.copytree(self.directory, self.taken[state], symlinks=True)
        finally:
            self.on = True


def killed_at_every_point(world, root, paths, consolidates):
    from safetensors.torch import load_file

    from ds_kd.checkpoint.manifest import verify
    from ds_kd.parallel.world import barrier

    directory, copies = root / "run", root / f"rank{world.rank}"
    directory.mkdir(exist_ok=True)
    made = trainer(world, paths, directory, consolidates)
    made.checkpointer.resume(made.student, made.state)
    snapshots, save = Snapshots(directory, copies), made.checkpointer.save

    def watched(engine, state, is_last, *rest, **options):
        barrier(world)
        snapshots.on = is_last
        save(engine, state, is_last, *rest, **options)
        snapshots.on = False

    made.checkpointer.save = watched
    made.train()
    expected = weights(made.student)
    barrier(world)

    copies = [path for rank in (0, 1) for path in sorted((root / f"rank{rank}").glob("*"))]
    different = {state_of(copy): copy for copy in reversed(copies)}
    barrier(world)
    ends = []
    for copy in different.values():
        again = trainer(world, paths, copy, consolidates)
        before = state_of(copy)
        barrier(world)
        found = again.checkpointer.resume(again.student, again.state)
        repeated = STEPS - again.state.step
        again.train()
        barrier(world)
        verify(copy / "LATEST")
        final = load_file(copy / "final" / "model.safetensors")
        ends.append(
            {
                "before": before,
                "found": found.name,
                "repeated": repeated,
                "equal": same(expected, weights(again.student)),
                "final": same(final, {n: expected[n] for n in final}),
                "left": sorted(path.name for path in copy.iterdir()),
                "latest": (copy / "LATEST").resolve().name,
                "real": not (copy / "final").is_symlink(),
            }
        )
        barrier(world)
    return {"ends": ends, "late": final_asked_for_later(world, root, paths)}


def final_asked_for_later(world, root, paths):
    """A finished run whose last checkpoint came without the student."""
    from safetensors.torch import load_file

    directory = root / "late"
    directory.mkdir(exist_ok=True)
    made = trainer(world, paths, directory, "false", 2)
    made.checkpointer.resume(made.student, made.state)
    made.train()
    again = trainer(world, paths, directory, "final", 2)
    again.checkpointer.resume(again.student, again.state)
    again.checkpointer.export_final(again.student)
    final, expected = load_file(directory / "final" / "model.safetensors"), weights(made.student)
    return (
        same(final, {n: expected[n] for n in final}) and (directory / "final/config.json").exists()
    )


@pytest.fixture(scope="module", params=["every", "final"])  # replaced by it, or new
def result(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    paths = {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }
    return run_ranks(killed_at_every_point, 2, root, paths, request.param)[0]


@pytest.fixture(scope="module")
def ends(result):
    return result["ends"]


def test_wherever_the_last_save_was_killed_the_run_ends_with_the_same_weights(ends):
    assert len(ends) >= 8, [end["before"] for end in ends]  # else the states were not told apart
    for end in ends:
        assert end["equal"] and end["final"] and end["real"], end
        assert end["latest"] == "step_0000004", end
        assert end["repeated"] in (0, 2), end


def test_nothing_stays_of_what_the_killed_save_had_written(ends):
    for end in ends:
        # The step before goes with the next save, where the kill came before it had gone.
        assert {*end["left"]} - {"step_0000002"} == {"BEST", "LATEST", "final", "step_0000004"}, end


def test_a_finished_run_writes_final_when_it_is_asked_for_later(result):
    assert result["late"]
