"""On-policy steps of ds_kd's own trainer and of others', each from its own data to its optimizer.

Each contender is a function of a job and a `Gate`: it builds the trainer as a user would and runs
its own loop, which waits at the gate before each step. All of them ask the same prompts in the same
order, write one answer to each at T = 1 up to the same number of tokens, and take a step of AdamW
on the reverse KL under the teacher, KL(student ‖ teacher), without clipping.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rollouts.gate import Gate
from benchmarks.rollouts.inputs import ENDLESS, LEARNING_RATE, Job
from benchmarks.rollouts.opsd_trainer import opsd
from benchmarks.rollouts.trl_trainers import trl_distillation, trl_gkd


def ds_kd(job: Job, gate: Gate, pack: int = 0) -> None:
    """Run `launch/kd.py`'s own trainer on one rank.

    Args:
        pack: tokens of a pack, which is then a micro-batch; 0 pads samples.
    """
    import deepspeed

    from ds_kd import build, load_config
    from ds_kd.models.generation.sampling import Draw

    with build(load_config(_make_config(job, pack))) as trainer:
        batches, student = trainer.batches, trainer.student
        after, write, step, optimize = batches.after, batches._write, trainer._step, student.step

        def wait_and_take(at: int) -> Any:
            made = after(at)
            while True:
                gate.begin()
                yield next(made)

        def write_and_tell(prompts: Any, draws: Any) -> Any:
            with gate.time_writing():
                found = write(prompts, draws)
            gate.add_texts(prompts, [text.tokens for text in found])
            return found

        def step_and_tell(micro_batches: Any, started: float) -> None:
            before = trainer.state.labels
            step(micro_batches, started)
            gate.add_loss(trainer._trained["train_loss"], trainer.state.labels - before)
            gate.end()

        def keep_and_optimize() -> None:
            named, read = student.module.model.named_parameters(), deepspeed.utils
            gate.keep_gradient((name, read.safe_get_full_grad(p)) for name, p in named)
            optimize()

        batches.after, batches._write = wait_and_take, write_and_tell
        trainer._step, student.step = step_and_tell, keep_and_optimize
        gate.write = lambda asked: [
            text.tokens for text in write(asked, [Draw(0, 0, str(p)) for p in asked])
        ]
        trainer.train()


def _make_config(job: Job, pack: int) -> dict[str, Any]:
    """Return the YAML of the run."""
    return {
        "model": {"pretrained_model_name_or_path": str(job.student), "torch_dtype": job.dtype},
        "teacher_model": {
            "pretrained_model_name_or_path": str(job.teacher),
            "torch_dtype": job.dtype,
        },
        "dataset": {
            "_target_": "ds_kd.data.chat.ChatDataset",
            "path_or_dataset_id": str(job.rows),
            "split": "train",
        },
        "dataloader": {"shuffle": False},
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": LEARNING_RATE,
            "weight_decay": 0,
        },
        "step_scheduler": {
            "global_batch_size": job.samples,
            "local_batch_size": 1 if pack else job.micro_batch,
            "max_steps": ENDLESS,
            "num_epochs": ENDLESS,
        },
        "packed_sequence": {"packed_sequence_size": pack},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(job.place)},
        "tensorboard": {"enabled": False},
        "rollouts": {"max_new_tokens": job.new_tokens, "temperature": 1.0},
    }


CONTENDERS: dict[str, tuple[Callable[[Job, Gate], None], str | None]] = {
    "ds_kd": (ds_kd, None),
    "ds_kd_packed": (functools.partial(ds_kd, pack=2048), None),
    "trl_distillation": (trl_distillation, "trl"),
    "trl_distillation_bf16": (functools.partial(trl_distillation, student_dtype="bf16"), "trl"),
    "trl_gkd": (trl_gkd, "trl"),
    "opsd": (opsd, "opsd"),
}


def available(
    names: list[str] | None, dtype: str, opsd_folder: Path | None
) -> dict[str, Callable[[Job, Gate], None]]:
    """Return the contenders whose package is installed, or whose folder is given, ds_kd first."""
    return {
        name: run
        for name, (run, needs) in CONTENDERS.items()
        if (names is None or name in names)
        and (not name.endswith("_bf16") or dtype == "bf16")
        and (needs != "trl" or importlib.util.find_spec("trl") is not None)
        and (needs != "opsd" or opsd_folder is not None)
    }
