"""Kill one run again and again, at random moments, and see that nothing is lost.

    python benchmarks/soaks/soak.py                 50 kills on 2 ranks, about 10 minutes on 2 cores
    python benchmarks/soaks/soak.py --kills 200 --seed 7
    python benchmarks/soaks/soak.py --kills 30 --more kd_ratio=1 rollouts.reuse=3    with rollouts

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
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import ROOT, make_parser

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

    def __init__(self, overrides: list[str], ranks: int, log: Path):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks)]
        guide = ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
        command += ["launch/kd.py", "--config", str(guide), *overrides]
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

    def until(self, true: Any, seconds: float = 180) -> bool:
        """Return whether it came true before the attempt was over."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing moved for {seconds} s:\n{self.text()}")
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def soak(
    kills: int, ranks: int, seed: int, root: Path, say: Any = print, more: Sequence[str] = ()
) -> dict[str, Any]:
    """Run, kill `kills` times, finish, compare.

    Args:
        more: overrides of the run.

    Returns:
        Figures: kills by moment, attempts, steps done again.

    Raises:
        AssertionError: something was lost; the message says what.
    """
    dice = random.Random(seed)
    steps = 8 * kills + 8
    straight, disturbed = root / "straight", root / "disturbed"
    one = Attempt(config(root, steps, straight, more), ranks, root / "straight.log")
    assert one.process.wait() == 0, one.text()
    overrides = config(root, steps, disturbed, more)
    done: Counter[str] = Counter()
    repeated = attempts = 0
    expected = 0  # the step that the next attempt must start from

    # The same command is given until it is left alone and ends by itself.
    while True:
        attempts += 1
        attempt = Attempt(overrides, ranks, root / f"attempt{attempts}.log")
        if sum(done.values()) < kills:
            done.update(_kill_at_random(attempt, dice, disturbed, expected, len(str(steps))))
        else:
            attempt.process.wait()
        _check_start(attempt.text(), expected)
        before, expected = expected, _find_latest(disturbed)
        assert expected >= before, f"LATEST went from {before} back to {expected}"
        repeated += max(0, max(_steps_in(attempt.text()), default=expected) - expected)
        say(f"attempt {attempts}: {dict(done)}, LATEST at {expected} of {steps}")
        if attempt.process.returncode == 0:
            assert sum(done.values()) == kills, f"the run was over after {dict(done)} kills"
            break
        assert attempt.process.returncode == -signal.SIGKILL, attempt.text()
    _compare_weights(disturbed, straight)
    return {"kills": sum(done.values()), "by moment": dict(done), "attempts": attempts,
            "steps": steps, "steps done again": repeated}  # fmt: skip


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
    time.sleep(dice.uniform(0, 8) if moment == "start" else dice.uniform(0, 0.4))
    if not alive or attempt.process.poll() is not None:
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
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        say = functools.partial(print, flush=True)
        figures = soak(args.kills, args.ranks, args.seed, Path(directory), say, args.more)
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
