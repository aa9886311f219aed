"""On-policy steps of TRL's two trainers for them, with their own loop."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.rollouts.gate import Gate
from benchmarks.rollouts.inputs import ENDLESS, LEARNING_RATE, Job, pad_left, read, take


def _make_arguments(job: Job) -> dict[str, Any]:
    """Return what both trainers of TRL are told."""
    return {
        "output_dir": str(job.place),
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
        "max_steps": ENDLESS,
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


def _train(trainer: Any, gate: Gate) -> None:
    """Run a trainer of transformers, with the gate before each step; its `count` returns the
    supervised tokens of the last micro-batch."""
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gate.keep_gradient((name, p.grad) for name, p in model.named_parameters())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.end()

    learn = trainer.training_step

    def learn_and_tell(*given: Any, **named: Any) -> Any:
        loss = learn(*given, **named)
        gate.add_loss(float(loss), trainer.count())
        return loss

    trainer.training_step = learn_and_tell
    trainer.add_callback(Stops())
    trainer.train()


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

        def count(self) -> int:
            kept = self._buffered_inputs[(self._step - 1) % len(self._buffered_inputs)]
            return int(kept["completion_mask"].sum())

    teacher, student, tokenizer = _load_pair(job, student_dtype)
    arguments = DistillationConfig(
        **_make_arguments(job), max_completion_length=job.new_tokens, shuffle_dataset=False
    )
    rows = [{"prompt": row["messages"][:-1]} for row in read(job)]
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
            prompts = take(ids[:, :begin], mask[:, :begin])
            gate.add_texts(prompts, take(ids[:, begin:], mask[:, begin:]))
            self.supervised = int((labels != -100).sum())
            return ids, mask, labels

        def count(self) -> int:
            return self.supervised

    teacher, student, tokenizer = _load_pair(job, "fp32")
    arguments = GKDConfig(
        **_make_arguments(job), max_new_tokens=job.new_tokens, lmbda=1.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Told(
        student, teacher, args=arguments, train_dataset=Dataset.from_list(read(job)),
        processing_class=tokenizer,
    )  # fmt: skip

    gate.write = functools.partial(_write_again, trainer, GKDTrainer.generate_on_policy_outputs)
    _train(trainer, gate)


@torch.no_grad()
def _write_again(trainer: Any, generate: Any, asked: list[list[int]]) -> list[list[int]]:
    """Return what GKDTrainer's function has the student write after prompts."""
    padding = trainer.processing_class.pad_token_id
    ids, mask = pad_left(asked, padding, trainer.model.device)
    inputs = {"prompts": ids, "prompt_attention_mask": mask}
    made, kept, _ = generate(trainer.model, inputs, trainer.generation_config)
    return take(made[:, ids.shape[1] :], kept[:, ids.shape[1] :])
