"""On-policy steps of ds_kd's own trainer and of others', each from its own data to its optimizer.

Each contender is a function of a job and a `Gate`: it builds the trainer as a user would and runs
its own loop, which waits at the gate before each step. All of them ask the same prompts in the same
order, write one answer to each at T = 1 up to the same number of tokens, and take a step of AdamW
on the reverse KL under the teacher, KL(student ‖ teacher), without clipping.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rollouts.gate import Gate

LEARNING_RATE = 1e-6
_ENDLESS = 1_000_000  # steps; the gate ends the loop


@dataclass(frozen=True)
class Job:
    """The work of every contender.

    Args:
        teacher, student: Hugging Face directories.
        rows: JSON lines with `messages`, whose last one is an answer.
        samples: prompts of an optimizer step.
        micro_batch: samples of a forward pass.
        new_tokens: the limit of an answer.
        dtype: `fp32` or `bf16`.
        place: a directory of this contender's own.
        opsd: the folder of DeepSpeedExamples' trainer.
    """

    teacher: Path
    student: Path
    rows: Path
    samples: int
    micro_batch: int
    new_tokens: int
    dtype: str
    place: Path
    opsd: Path | None = None

    @property
    def micro_batches(self) -> int:
        return self.samples // self.micro_batch


# ---- ds_kd ---------------------------------------------------------------------------------------


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
            "max_steps": _ENDLESS,
            "num_epochs": _ENDLESS,
        },
        "packed_sequence": {"packed_sequence_size": pack},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(job.place)},
        "tensorboard": {"enabled": False},
        "rollouts": {"max_new_tokens": job.new_tokens, "temperature": 1.0},
    }


# ---- TRL -----------------------------------------------------------------------------------------


def _make_arguments(job: Job) -> dict[str, Any]:
    """Return what both trainers of TRL are told."""
    return {
        "output_dir": str(job.place),
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
        "max_steps": _ENDLESS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": job.dtype == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "temperature": 1.0,
        "beta": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _load_pair(job: Job, student_dtype: str) -> tuple[Any, Any, Any]:
    """Return (teacher, student, tokenizer); the teacher is in the job's dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(job.student)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    load = AutoModelForCausalLM.from_pretrained
    teacher = load(job.teacher, dtype=kinds[job.dtype])
    return teacher, load(job.student, dtype=kinds[student_dtype]), tokenizer


def _read_rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.rows.read_text("utf-8").splitlines()]


def _train(trainer: Any, gate: Gate) -> None:
    """Run a trainer of transformers, with the gate before each step."""
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gate.keep_gradient((name, p.grad) for name, p in model.named_parameters())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.end()

    trainer.add_callback(Stops())
    trainer.train()


def _pad_left(prompts: list[list[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return (tokens, attention mask)."""
    length = max(map(len, prompts))
    ids = [[padding] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _take(rows: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row that its mask holds."""
    return [row[kept.bool()].tolist() for row, kept in zip(rows, mask, strict=True)]


def trl_distillation(job: Job, gate: Gate, student_dtype: str = "fp32") -> None:
    """Run TRL's DistillationTrainer.

    Args:
        student_dtype: of the student's weights; with `bf16` its optimizer has no others.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Told(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *more: Any, **named: Any) -> Any:
            with gate.time_writing():
                found = super()._generate_single_turn(prompt_ids, *more, **named)
            gate.add_texts(prompt_ids, found)
            return found

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            kept = self._buffered_inputs[(self._step - 1) % len(self._buffered_inputs)]
            gate.add_loss(float(loss), int(kept["completion_mask"].sum()))
            return loss

    teacher, student, tokenizer = _load_pair(job, student_dtype)
    arguments = DistillationConfig(
        **_make_arguments(job), max_completion_length=job.new_tokens, shuffle_dataset=False
    )
    rows = [{"prompt": row["messages"][:-1]} for row in _read_rows(job)]
    trainer = Told(
        student, teacher, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    ask = functools.partial(DistillationTrainer._generate_single_turn, trainer)
    gate.write = lambda asked: ask(asked, None, {})
    _train(trainer, gate)


def trl_gkd(job: Job, gate: Gate) -> None:
    """Run TRL's GKDTrainer on the student's texts alone, with reverse KL."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Told(GKDTrainer):
        def generate_on_policy_outputs(self, model: Any, inputs: Any, config: Any) -> Any:
            with gate.time_writing():
                ids, mask, labels = super().generate_on_policy_outputs(model, inputs, config)
            begin = inputs["prompts"].shape[1]
            prompts = _take(ids[:, :begin], mask[:, :begin])
            gate.add_texts(prompts, _take(ids[:, begin:], mask[:, begin:]))
            self.supervised = int((labels != -100).sum())
            return ids, mask, labels

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            gate.add_loss(float(loss), self.supervised)
            return loss

    teacher, student, tokenizer = _load_pair(job, "fp32")
    arguments = GKDConfig(
        **_make_arguments(job), max_new_tokens=job.new_tokens, lmbda=1.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Told(
        student, teacher, args=arguments, train_dataset=Dataset.from_list(_read_rows(job)),
        processing_class=tokenizer,
    )  # fmt: skip

    @torch.no_grad()
    def write(asked: list[list[int]]) -> list[list[int]]:
        ids, mask = _pad_left(asked, tokenizer.pad_token_id, trainer.model.device)
        inputs, how = {"prompts": ids, "prompt_attention_mask": mask}, trainer.generation_config
        made, kept, _ = GKDTrainer.generate_on_policy_outputs(trainer.model, inputs, how)
        return _take(made[:, ids.shape[1] :], kept[:, ids.shape[1] :])

    gate.write = write
    _train(trainer, gate)


# ---- DeepSpeedExamples ---------------------------------------------------------------------------


def opsd(job: Job, gate: Gate) -> None:
    """Run the main function of DeepSpeedExamples' training/opsd, which is read from `job.opsd`."""
    sys.path.insert(0, str(job.opsd))
    import main  # type: ignore[import-not-found]
    from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

    class Told(main.OPSDTrainer):
        def __init__(self, **parts: Any):
            super().__init__(**parts)
            self.generate, self.optimize = self.rollout.generate, self.student_engine.step
            self.rollout.generate, self.student_engine.step = self.write, self.keep_and_optimize
            self.micro_step = 0
            gate.write = self.write_again

        def write(self, request: Any, how: Any) -> Any:
            with gate.time_writing():
                made = self.generate(request, how)
            begin = request.prompt_ids.shape[1]
            prompts = _take(request.prompt_ids, request.prompt_attention_mask)
            texts = _take(made.input_ids[:, begin:], made.attention_mask[:, begin:])
            gate.add_texts(prompts, texts)
            return made

        def write_again(self, asked: list[list[int]]) -> list[list[int]]:
            ids, mask = _pad_left(asked, self.tokenizer.pad_token_id, self.device)
            how = SamplingConfig(max_new_tokens=job.new_tokens, temperature=1.0, top_k=-1)
            made = self.generate(RolloutRequest(ids, mask), how)
            begin = ids.shape[1]
            return _take(made.input_ids[:, begin:], made.attention_mask[:, begin:])

        def keep_and_optimize(self) -> None:
            if self.student_engine.is_gradient_accumulation_boundary():
                read = main.deepspeed.utils.safe_get_full_grad
                named = self.student_engine.module.named_parameters()
                gate.keep_gradient((name, read(p)) for name, p in named)
            self.optimize()

        def _train_step(self, batch: Any) -> Any:
            if self.micro_step % job.micro_batches == 0:
                gate.begin()
            told = super()._train_step(batch)
            self.micro_step += 1
            gate.add_loss(told["loss"] / job.micro_batches, told["response_tokens"])
            if self.micro_step % job.micro_batches == 0:
                gate.end()
            return told

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", _find_port())
    main.OPSDTrainer = Told
    sys.argv = ["main.py", "--config", str(_write_opsd_config(job))]
    main.main()


def _find_port() -> str:
    from ds_kd.parallel.rendezvous import free_port

    return str(free_port())


def _write_opsd_config(job: Job) -> Path:
    """Write the two files of an OPSD run, as its smoke test on one device has them, and the
    prompts, and return the first file."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}[job.dtype]
    prompts, zero, config = (job.place / f"{n}.json" for n in ("prompts", "zero", "opsd"))
    asked = [json.dumps({"prompt": row["messages"][:-1]}) for row in _read_rows(job)]
    prompts.write_text("\n".join(asked), "utf-8")
    adamw = {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True}
    zero.write_text(json.dumps({
        "bf16": {"enabled": job.dtype == "bf16"},
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": adamw},
        "gradient_clipping": 0.0,
    }), "utf-8")  # fmt: skip

    model = {"dtype": kind, "model_name_or_path": str(job.student)}
    config.write_text(json.dumps({
        "student": model,
        "teacher": {
            **model, "model_name_or_path": str(job.teacher), "offload_to_cpu": False,
        },
        "rollout": {
            "max_prompt_length": 4096, "max_response_length": job.new_tokens, "temperature": 1.0,
        },
        "distillation": {"loss_type": "reverse_kl", "temperature": 1.0},
        "training": {
            "micro_batch_size_per_gpu": job.micro_batch,
            "gradient_accumulation_steps": job.micro_batches,
            "num_train_epochs": _ENDLESS, "logging_steps": _ENDLESS, "save_steps": _ENDLESS,
        },
        "data": {"path": str(prompts), "prompt_field": "prompt", "shuffle": False},
        "deepspeed_config": str(zero),
    }), "utf-8")  # fmt: skip
    return config


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
