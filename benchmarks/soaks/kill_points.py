"""Kill one rank of a run between any two file operations of its last save, and start it again.

    python benchmarks/soaks/kill_points.py              every point of both ranks; about 25 minutes
    python benchmarks/soaks/kill_points.py --every 8    every eighth

SIGKILL is real, and so are the ranks: each is a process that runs `launch/kd.py`, forked from one
that has imported torch already. A rank counts its file operations from the moment in which its last
save begins to its own end (Python's by audit events; those of torch's and safetensors' writers,
which no event tells, by the calls into them) and kills itself before the one it was told to.
The other rank must end with one message that names the rank that is gone. The same command must
then end with the weights of a run that nobody disturbed, `final` among them, and leave nothing of
the killed one.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import ROOT, make_parser

STEPS, RANKS = 4, 2
GUIDE = ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link"}
#: Calls into C++ and Rust that write files.
_WRITERS = {"write_record", "write_end_of_file", "serialize_file", "PyTorchFileWriter"}


class Countdown:
    """Kills this process before its file operation number `at` since its last save began.

    Args:
        at: from 0; -1 kills nothing, and the number is what is learnt.
        begins: a path that is there once the last save has begun.
    """

    def __init__(self, directory: Path, at: int):
        self.begins = directory / f".saving.step_{STEPS:07d}"
        self.at, self.count, self.main = at, 0, threading.get_ident()
        sys.addaudithook(self.audit)
        sys.setprofile(self.profile)

    def audit(self, event: str, arguments: tuple) -> None:
        """Count an operation of Python's own."""
        if event not in _EVENTS or threading.get_ident() != self.main:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        self.step()

    def profile(self, frame: Any, event: str, argument: Any) -> None:
        """Count a call into a writer that tells no event."""
        if event == "c_call" and getattr(argument, "__name__", "") in _WRITERS:
            self.step()

    def step(self) -> None:
        """Count one operation, or kill this process before it."""
        if self.count == 0 and not self.begins.exists():
            return
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


_PRELOADED = ["deepspeed", "datasets", "transformers.models.llama.modeling_llama"]
_PRELOADED += ["transformers.integrations.deepspeed", "ds_kd.recipe.run", "tests.scripts"]
_WRITING = os.O_WRONLY | os.O_RDWR


def overrides(root: Path, directory: Path, consolidated: str) -> list[str]:
    """Return the overrides of a run with two saves, of which the second replaces the first."""
    from tests import tiny

    if not (root / "rows.jsonl").exists():
        tiny.llama(root / "student", seed=1)
        tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)
        (root / "rows.jsonl").write_text(tiny.squad_rows(22))
    return [
        f"model.pretrained_model_name_or_path={root / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={root / 'teacher'}",
        f"dataset.dataset_name={root / 'rows.jsonl'}",
        f"checkpoint.checkpoint_dir={directory}",
        f"checkpoint.save_consolidated={consolidated}",
        "checkpoint.keep_last=1",
        "validation_dataset=null",
        "dist_env.backend=gloo",
        "dist_env.timeout_minutes=0.5",
        "dataloader.num_workers=0",
        "tensorboard.enabled=false",
        "step_scheduler.global_batch_size=8",
        f"step_scheduler.max_steps={STEPS}",
        "step_scheduler.num_epochs=9",
        "step_scheduler.ckpt_every_steps=2",
        "optimizer.lr=0.01",
    ]


def _rank(rank: int, port: int, log: str, words: list[str], directory: Path, at: int) -> None:
    """Run one rank, in a process of its own that has just been forked."""
    from tests.scripts import script

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    countdown = Countdown(directory, at)
    code = script("kd").main(["--config", str(GUIDE), *words])
    sys.setprofile(None)
    print(f"operations: {countdown.count}", flush=True)
    os._exit(code)  # as the server would go on with what it was forked for


@functools.cache
def _context() -> Any:
    """Return the server of processes, which has imported what a run needs."""
    # As `quiet` sets them; here torch and DeepSpeed are there before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def attempt(
    words: list[str], directory: Path, logs: Path, kill: tuple[int, int] | None = None
) -> tuple[list[int], list[str]]:
    """Run the command once.

    Args:
        kill: rank and number of the operation before which it dies.

    Returns:
        Exit codes and outputs, by rank.
    """
    from ds_kd.parallel.rendezvous import free_port

    port = free_port()
    paths = [logs / f"rank{rank}.log" for rank in range(RANKS)]
    ranks = []

    # Both ranks are started before either is waited for; one that hangs fails the attempt.
    for rank in range(RANKS):
        at = kill[1] if kill is not None and kill[0] == rank else -1
        arguments = (rank, port, str(paths[rank]), words, directory, at)
        ranks.append(_context().Process(target=_rank, args=arguments))
        ranks[-1].start()
    for process in ranks:
        process.join(180)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    texts = [path.read_text() for path in paths]
    assert not hung, f"a rank hangs, kill {kill}:\n" + "\n".join(texts)
    return [process.exitcode for process in ranks], texts


class Points:
    """A run that must end with the same files wherever it was killed."""

    def __init__(self, root: Path, consolidated: str):
        self.root, self.consolidated = root, consolidated
        straight = root / f"straight-{consolidated}"
        codes, texts = attempt(overrides(root, straight, consolidated), straight, root)
        assert codes == [0, 0], "\n".join(texts)
        self.counts = [int(text.rpartition("operations: ")[2]) for text in texts]
        self.final = (straight / "final" / "model.safetensors").read_bytes()
        self.left = _names(straight)
        self.before = root / f"before-{consolidated}"  # as the run is when its last save begins
        self._kill_and_look(self.before, 0, 0)
        shutil.rmtree(self.before / f".saving.step_{STEPS:07d}")  # its own begins the count

    def check(self, rank: int, at: int) -> str:
        """Kill `rank` before its operation `at`, and start again.

        Returns:
            The remains of the kill, in words.

        Raises:
            AssertionError: something was lost; the message says what.
        """
        directory = self.root / "killed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.before, directory, symlinks=True)
        state = self._kill_and_look(directory, rank, at)
        words = overrides(self.root, directory, self.consolidated)
        codes, texts = attempt(words, directory, self.root)
        told = f"killed rank {rank} before operation {at}, which left {state}:\n{''.join(texts)}"
        assert codes == [0, 0], told
        assert (directory / "LATEST").resolve().name == f"step_{STEPS:07d}", told
        assert (directory / "final" / "model.safetensors").read_bytes() == self.final, told
        assert {*_names(directory)} - {"step_0000002"} == {*self.left}, told
        return state

    def _kill_and_look(self, directory: Path, rank: int, at: int) -> str:
        """Kill a rank before its operation `at`, check how the other ends, and return what is
        left."""
        words = overrides(self.root, directory, self.consolidated)
        codes, texts = attempt(words, directory, self.root, (rank, at))
        told = f"rank {rank}, operation {at}: exit codes {codes}\n" + "\n".join(texts)
        assert codes[rank] == -signal.SIGKILL, told
        other, text = codes[1 - rank], texts[1 - rank]
        # Rank 0 has no more to ask of the others once they have all left the job.
        assert other == 1 or (rank == 0 and other == 0 and "operations: " in text), told
        if other:
            assert text.count(f"rank {rank} does not answer") == 1, told
        assert "Traceback" not in text and "frame #" not in text, told
        return ", ".join(_names(directory))


def _names(directory: Path) -> list[str]:
    """Return the entries of a checkpoint directory, links with where they lead."""
    return sorted(
        f"{path.name} → {path.readlink()}" if path.is_symlink() else path.name
        for path in directory.iterdir()
        if not path.name.startswith((".RUNNING", "tensorboard"))
    )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th point")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with this point")
    parser.add_argument("--consolidated", choices=["final", "every"], default="every")
    args = parser.parse_args()
    started, checked = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as directory:
        points = Points(Path(directory), args.consolidated)
        print(f"operations of the last save, by rank: {points.counts}", flush=True)
        for rank, count in enumerate(points.counts):
            for at in range(args.first, count, args.every):
                print(f"rank {rank}, {at}: {points.check(rank, at)}", flush=True)
                checked += 1
    seconds = round(time.monotonic() - started)
    print(json.dumps({"points": checked, "of": sum(points.counts), "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
