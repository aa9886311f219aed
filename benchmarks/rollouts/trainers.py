"""Optimizer steps on the student's own texts, by ds_kd and by others, on the same prompts.

Each contender is a function of a job and a gate: it takes a step whenever the gate lets it, and
tells what came of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """The work that every contender does.

    Args:
        prompts: of a step.
        cut: prompts of a micro-batch.
        new_tokens: limit of an answer.
        temperature: of drawing; 0 takes the likeliest token.
        steps: the first of them is thrown away.
        pack: tokens of a pack of ds_kd; 0 pads.
    """

    teacher: str
    student: str
    data: str
    prompts: int
    cut: int
    new_tokens: int
    temperature: float
    steps: int
    pack: int


class Gate:
    """Lets a contender take one step when it is told to, and tells what the step cost."""

    def __init__(self, pipe: Any):
        self._pipe = pipe

    def wait(self) -> None:
        """Wait for the order to take a step.

        Raises:
            EOFError: there is none any more.
        """
        self._pipe.recv()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def tell(self, loss: float, prompts: int, texts: list[list[int]]) -> None:
        """Tell the loss of the step, the tokens of its prompts, and the texts in their order."""
        cost = {
            "wall": time.perf_counter() - self._wall,
            "cpu": time.process_time() - self._cpu,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        digest = hashlib.blake2b(repr(texts).encode(), digest_size=4).hexdigest()
        lengths = {"prompts": prompts, "answers": sum(map(len, texts))}
        self._pipe.send({**cost, **lengths, "loss": loss, "texts": digest})


def read_prompts(job: Job) -> list[list[dict[str, str]]]:
    """Return the conversations of all steps, without the last turn."""
    with Path(job.data).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, job.prompts * job.steps)]
    return [row["messages"][:-1] for row in rows]


# ---- ds_kd ---------------------------------------------------------------------------------------


def build_ours(job: Job, directory: str) -> Any:
    """Return the trainer of a run on the job's prompts."""
    import ds_kd

    values = {
        "model": {"pretrained_model_name_or_path": job.student, "torch_dtype": "fp32"},
        "teacher_model": {"pretrained_model_name_or_path": job.teacher, "torch_dtype": "fp32"},
        "dataset": {"_target_": "ds_kd.data.chat.ChatDataset", "path_or_dataset_id": job.data},
        "rollouts": {
            "ratio": 1.0,
            "max_new_tokens": job.new_tokens,
            "temperature": job.temperature,
            "generate": "replica",
        },
        "step_scheduler": {
            "global_batch_size": job.prompts,
            "local_batch_size": 1 if job.pack else job.cut,
        },
        "packed_sequence": {"packed_sequence_size": job.pack},
        "dataloader": {"shuffle": False},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": LEARNING_RATE},
        "checkpoint": {"enabled": False},
        "tensorboard": {"enabled": False, "log_dir": directory},
        "dist_env": {"backend": "gloo"},
    }
    return ds_kd.build(ds_kd.load_config(values))


def run_ours(job: Job, gate: Gate) -> None:
    """Take the trainer's own steps."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_ours(job, directory)
        seen: dict[str, Any] = {}
        trainer.metrics.train = lambda _, values: seen.update(values)
        batches = trainer.batches.after(0)
        for _ in range(job.steps):
            gate.wait()
            started = time.perf_counter()
            trainer._step(next(batches), started)
            window = trainer.batches._window
            texts = [text.tokens for text in window.texts]
            gate.tell(seen["train_loss"], sum(map(len, window.prompts)), texts)
        trainer.close()


# ---- TRL -----------------------------------------------------------------------------------------


def run_trl(job: Job, gate: Gate) -> None:
    """Take the steps of TRL's DistillationTrainer, which asks for the rows in their order."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    found: dict[str, Any] = {}

    class Told(DistillationTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Any:
            loss = super().compute_loss(*args, **named)
            found["loss"] = found.get("loss", 0.0) + float(loss)
            return loss

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **named: Any) -> None:
            found.clear()
            gate.wait()

        def on_step_end(self, *args: Any, **named: Any) -> None:
            parts = trainer._buffered_inputs
            prompts = sum(int(part["prompt_mask"].sum()) for part in parts)
            texts = [
                row[kept.bool()].tolist()
                for part in parts
                for row, kept in zip(part["completion_ids"], part["completion_mask"], strict=True)
            ]
            gate.tell(found["loss"], prompts, texts)

    with tempfile.TemporaryDirectory() as directory:
        trainer = Told(
            model=job.student,
            teacher_model=job.teacher,
            args=DistillationConfig(output_dir=directory, **make_trl_settings(job)),
            train_dataset=Dataset.from_list([{"prompt": each} for each in read_prompts(job)]),
            processing_class=AutoTokenizer.from_pretrained(job.student),
            callbacks=[Turns()],
        )
        trainer.train()


def make_trl_settings(job: Job) -> dict[str, Any]:
    """Return the arguments of TRL's configuration for the job."""
    draws = {"temperature": job.temperature} if job.temperature else {"top_k": 1}
    return {
        "max_steps": job.steps,
        "per_device_train_batch_size": job.cut,
        "gradient_accumulation_steps": job.prompts // job.cut,
        "max_completion_length": job.new_tokens,
        "top_p": 1.0,
        **draws,
        "beta": 1.0,  # reverse KL
        "shuffle_dataset": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_model_init_kwargs": {"dtype": "float32"},
    }


# ---- DeepSpeed's rollouts ------------------------------------------------------------------------


def run_opsd(job: Job, gate: Gate, stage: int = 0) -> None:
    """Take the steps of DeepSpeedExamples' OPSDTrainer: for each micro-batch rollout, teacher,
    whole logits of the student, and a mean over that micro-batch's tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ds_kd.parallel import world

    world.start("gloo", 10)
    tokenizer = AutoTokenizer.from_pretrained(job.student, padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (job.student, job.teacher)
    )
    engine = start_deepspeed(student, job, stage)
    conversations = read_prompts(job)
    for step in range(job.steps):
        gate.wait()
        rows = conversations[step * job.prompts : (step + 1) * job.prompts]
        losses, prompts, texts = [], 0, []
        for first in range(0, job.prompts, job.cut):
            inputs = tokenizer.apply_chat_template(
                rows[first : first + job.cut], add_generation_prompt=True, padding=True,
                return_tensors="pt", return_dict=True,
            )  # fmt: skip
            loss, written = take_micro_batch(engine, teacher.eval(), tokenizer, inputs, job)
            losses.append(loss)
            prompts += int(inputs["attention_mask"].sum())
            texts += written
        gate.tell(statistics.mean(losses), prompts, texts)


def start_deepspeed(model: Any, job: Job, stage: int) -> Any:
    """Return DeepSpeed's engine around a model, which takes a step after all micro-batches."""
    import deepspeed
    import torch

    settings = {
        "train_micro_batch_size_per_gpu": job.cut,
        "gradient_accumulation_steps": job.prompts // job.cut,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def take_micro_batch(
    engine: Any, teacher: Any, tokenizer: Any, inputs: Any, job: Job
) -> tuple[float, list[list[int]]]:
    """Return the loss of a micro-batch and the texts of its prompts; the engine steps after the
    last one."""
    import torch
    from deepspeed.runtime.rollout import (
        HybridEngineRollout,
        ResponseTokenBatch,
        RolloutRequest,
        SamplingConfig,
        generalized_jsd_loss,
    )

    engine.eval()
    ask = RolloutRequest(inputs["input_ids"], inputs["attention_mask"])
    how = SamplingConfig(max_new_tokens=job.new_tokens, temperature=job.temperature)
    rollout = HybridEngineRollout(engine, tokenizer).generate(ask, how)
    batch = ResponseTokenBatch.from_rollout(rollout)
    model_inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    # The example parks the teacher's whole logits on the host in bf16.
    with torch.no_grad():
        kept = teacher(**model_inputs).logits.to(torch.bfloat16)
    engine.train()
    logits = batch.select_causal_logits(engine(**model_inputs).logits)
    target = batch.select_causal_logits(kept).float()
    loss = generalized_jsd_loss(logits, target, batch.response_mask, beta=1.0).loss
    engine.backward(loss)
    engine.step()
    rows = zip(batch.target_ids, batch.response_mask, strict=True)
    return float(loss), [ids[mask].tolist() for ids, mask in rows]


CONTENDERS: dict[str, Callable[[Job, Gate], None]] = {
    "ds_kd": run_ours,
    "trl": run_trl,
    "opsd": run_opsd,
    "opsd_zero3": lambda job, gate: run_opsd(job, gate, 3),
}
