"""Kill one run again and again, at random moments, and see that nothing is lost.

    python benchmarks/soaks/soak.py                 50 kills on 2 ranks, about 10 minutes on 2 cores
    python benchmarks/soaks/soak.py --kills 200 --seed 7
    python benchmarks/soaks/soak.py --kills 30 --more kd_ratio=1 rollouts.reuse=3    with rollouts
    python benchmarks/soaks/soak.py --directory DIR --minutes 7        in pieces: repeat it to go on
    python benchmarks/soaks/soak.py --forked    ranks without a launcher, which start quickly

A small Llama with dropout is distilled on shuffled data. Every attempt gets SIGKILL for all its
processes while it starts, in a step, while a checkpoint is written or while the student is
exported; then the same command is given again. After each kill every published checkpoint must
agree with its manifest, and the next attempt must go on from the one that LATEST named. At the end
the weights must be, bit by bit, those of a run that nobody disturbed.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import ROOT, make_parser
from benchmarks.soaks.forked import GUIDE, run_rank, server

#: The phase in which an attempt is killed, and how often.
MOMENTS = {"start": 1, "step": 4, "saving": 5}


def config(root: Path, steps: int, directory: Path, more: Sequence[str] = ()) -> list[str]:
    """Make models and rows, if there are none, and return the overrides of the run."""
    from tests import tiny

    if not (root / "rows.jsonl").exists():
        tiny.llama(root / "student", seed=1)
        tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)
        model = root / "student" / "config.json"
        model.write_text(json.dumps({**json.loads(model.read_text()), "attention_dropout": 0.1}))
        (root / "rows.jsonl").write_text(tiny.squad_rows(22))
    return [
        f"model.pretrained_model_name_or_path={root / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={root / 'teacher'}",
        f"dataset.dataset_name={root / 'rows.jsonl'}",
        "validation_dataset=null",
        "dist_env.backend=gloo",
        "dataloader.shuffle=true",
        "dataloader.num_workers=0",
        "checkpoint.save_consolidated=every",
        "checkpoint.keep_last=3",
        f"checkpoint.checkpoint_dir={directory}",
        "step_scheduler.global_batch_size=8",
        "step_scheduler.num_epochs=999",
        f"step_scheduler.max_steps={steps}",
        "step_scheduler.ckpt_every_steps=2",
        "optimizer.lr=0.001",
        *more,
    ]


class Attempt:
    """One start of the run's command, in a process group of its own."""

    start = 8.0  # seconds in which it has about begun to train

    def __init__(self, overrides: list[str], ranks: int, log: Path):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks)]
        command += ["launch/kd.py", "--config", str(GUIDE), *overrides]
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def text(self) -> str:
        return self.log.read_text()

    def has_said(self, words: str) -> bool:
        return words in self.text()

    def poll(self) -> int | None:
        """Return the exit code, or None as long as it runs."""
        return self.process.poll()

    def wait(self) -> int:
        return self.process.wait()

    def until(self, true: Any, seconds: float = 180) -> bool:
        """Return whether it came true before the attempt was over."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing moved for {seconds} s:\n{self.text()}")
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Forked(Attempt):
    """The same ranks without a launcher, forked from a process that has imported torch."""

    start = 2.0

    def __init__(self, overrides: list[str], ranks: int, log: Path):
        from ds_kd.parallel.rendezvous import free_port

        self.log, port = log, free_port()
        log.write_text("")
        self.ranks = [
            server().Process(target=run_rank, args=(rank, ranks, port, str(log), overrides))
            for rank in range(ranks)
        ]
        for rank in self.ranks:
            rank.start()

    def poll(self) -> int | None:
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else min(codes) or max(codes)

    def wait(self) -> int:
        for rank in self.ranks:
            rank.join()
        return self.poll() or 0

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.wait()


@dataclass
class Progress:
    """The state of a soak after an attempt, kept in a file, from which the same command goes on.

    Args:
        by_moment: kills in each phase.
        attempts: starts of the run's command.
        repeated: steps that were done again.
        inside: kills after which the run went on inside a buffer of the student's texts.
    """

    by_moment: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    repeated: int = 0
    inside: int = 0

    @classmethod
    def read(cls, file: Path) -> Progress:
        kept = json.loads(file.read_text())
        return cls(**kept | {"by_moment": Counter(kept["by_moment"])})

    @property
    def kills(self) -> int:
        return sum(self.by_moment.values())


def soak(
    kills: int,
    ranks: int,
    seed: int,
    root: Path,
    say: Any = print,
    more: Sequence[str] = (),
    seconds: float = float("inf"),
    start: type[Attempt] = Attempt,
) -> dict[str, Any] | None:
    """Run, kill `kills` times, finish, compare.

    Args:
        root: directory of models and runs; one that an earlier piece of the soak has left goes on.
        more: overrides of the run.
        seconds: no attempt starts after so many.
        start: how the command is started.

    Returns:
        Figures: kills by moment, attempts, steps done again; None if the time was over before.

    Raises:
        AssertionError: something was lost; the message says what.
    """
    began, steps = time.monotonic(), _count_steps(kills)
    straight, disturbed, file = root / "straight", root / "disturbed", root / "soak.json"
    if not file.exists():
        shutil.rmtree(straight, ignore_errors=True)
        one = start(config(root, steps, straight, more), ranks, root / "straight.log")
        assert one.wait() == 0, one.text()
        file.write_text(json.dumps(vars(Progress())))
    progress, words = Progress.read(file), config(root, steps, disturbed, more)

    # The same command is given until it is left alone and ends by itself.
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        if time.monotonic() - began > seconds:
            return None
        log = root / f"attempt{progress.attempts + 1}.log"
        code = _attempt(start(words, ranks, log), kills, seed, progress, disturbed)
        file.write_text(json.dumps(vars(progress)))
        at = _find_latest(disturbed)
        say(f"attempt {progress.attempts}: {dict(progress.by_moment)}, LATEST at {at} of {steps}")
    assert progress.kills == kills, f"the run was over after {dict(progress.by_moment)} kills"
    _compare_weights(disturbed, straight)
    return {"kills": kills, "by moment": dict(progress.by_moment), "attempts": progress.attempts,
            "steps": steps, "steps done again": progress.repeated,
            "kills that went on inside a buffer": progress.inside}  # fmt: skip


def _count_steps(kills: int) -> int:
    """Return the steps of a run that is not over before it was killed so often."""
    return 6 * kills + 14


def _attempt(attempt: Attempt, kills: int, seed: int, progress: Progress, directory: Path) -> int:
    """Kill an attempt that has just started if kills are left, check what is there afterwards, and
    return its exit code."""
    expected, digits = _find_latest(directory), len(str(_count_steps(kills)))
    progress.attempts += 1
    if progress.kills < kills:
        dice = random.Random(f"{seed} {progress.attempts}")
        progress.by_moment.update(_kill_at_random(attempt, dice, directory, expected, digits))
    else:
        attempt.wait()
    _check_start(attempt.text(), expected)
    code, latest = attempt.wait(), _find_latest(directory)
    assert code in (0, -signal.SIGKILL), attempt.text()
    assert latest >= expected, f"LATEST went from {expected} back to {latest}"
    progress.repeated += max(0, max(_steps_in(attempt.text()), default=latest) - latest)
    progress.inside += code != 0 and (directory / "LATEST" / "rollouts.json").is_file()
    return int(code)


def _kill_at_random(
    attempt: Attempt, dice: random.Random, directory: Path, expected: int, digits: int
) -> list[str]:
    """Kill an attempt at a random moment, and return that moment; none if it was over before."""
    moment = dice.choices([*MOMENTS], [*MOMENTS.values()])[0]
    line = f"step {expected + dice.randint(1, 4):>{digits}}/"
    alive = attempt.until(
        {
            "start": lambda: True,
            "step": functools.partial(attempt.has_said, line),
            "saving": lambda: any(directory.glob(".saving.*/*")),
        }[moment]
    )
    time.sleep(dice.uniform(0, attempt.start if moment == "start" else 0.4))
    if not alive or attempt.poll() is not None:
        return []
    attempt.kill()
    return [moment]


def _steps_in(text: str) -> list[int]:
    """Return the numbers of the steps that a log tells."""
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    return [int(line.split()[1].partition("/")[0]) for line in lines]


def _find_latest(directory: Path) -> int:
    """Verify every published checkpoint, and return the step of LATEST, 0 if there is none."""
    from ds_kd.checkpoint.manifest import verify

    for checkpoint in directory.glob("step_*"):
        verify(checkpoint)
    link = directory / "LATEST"
    return int(link.resolve().name[-7:]) if link.exists() else 0


def _compare_weights(disturbed: Path, straight: Path) -> None:
    import torch
    from safetensors.torch import load_file

    got, want = (load_file(d / "final" / "model.safetensors") for d in (disturbed, straight))
    unequal = [name for name in want if not torch.equal(want[name], got[name])]
    assert not unequal, f"weights differ from the undisturbed run's: {unequal}"


def _check_start(text: str, expected: int) -> None:
    """Check that an attempt which got as far as its checkpoint took the right one."""
    if "ready in" not in text or "step " not in text:
        return
    told = f"at step {expected}\n" if expected else "step "
    assert told in text, f"not resumed from step {expected}:\n{text}"
    assert "set aside" not in text, text


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", nargs="*", default=[], help="overrides of the run")
    parser.add_argument("--directory", type=Path, help="keep all here, to go on from")
    parser.add_argument("--forked", action="store_true", help="start ranks without the launcher")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing later")
    args = parser.parse_args()
    started, say = time.monotonic(), functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory() as place:
        root = args.directory or Path(place)
        root.mkdir(parents=True, exist_ok=True)
        chosen = args.kills, args.ranks, args.seed, root.absolute(), say, args.more
        start = Forked if args.forked else Attempt
        figures = soak(*chosen, 60 * args.minutes, start)
    if figures is None:
        print("the time is over; the same command goes on")
    else:
        print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
