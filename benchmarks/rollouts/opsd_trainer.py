"""On-policy steps of DeepSpeedExamples' training/opsd, which is read from a checkout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.rollouts.gate import Gate
from benchmarks.rollouts.inputs import ENDLESS, LEARNING_RATE, Job, pad_left, read, take


def opsd(job: Job, gate: Gate) -> None:
    """Run its main function with its own trainer, which waits at the gate."""
    sys.path.insert(0, str(job.opsd))
    import main  # type: ignore[import-not-found]

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", _find_port())
    main.OPSDTrainer = _make_trainer(main.OPSDTrainer, job, gate)
    sys.argv = ["main.py", "--config", str(_write_opsd_config(job))]
    main.main()


def _make_trainer(kind: type[Any], job: Job, gate: Gate) -> type[Any]:
    """Return its trainer's class with the gate around each step."""
    import deepspeed
    from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

    class Told(kind):
        def __init__(self, **parts: Any):
            super().__init__(**parts)
            self.generate, self.optimize = self.rollout.generate, self.student_engine.step
            self.rollout.generate, self.student_engine.step = self.write, self.keep_and_optimize
            self.micro_step = 0
            gate.write = self.write_again

        def write(self, request: Any, how: Any) -> Any:
            with gate.time_writing():
                made = self.generate(request, how)
            prompts = take(request.prompt_ids, request.prompt_attention_mask)
            gate.add_texts(prompts, _take_texts(made, request))
            return made

        def write_again(self, asked: list[list[int]]) -> list[list[int]]:
            request = RolloutRequest(*pad_left(asked, self.tokenizer.pad_token_id, self.device))
            how = SamplingConfig(max_new_tokens=job.new_tokens, temperature=1.0)
            return _take_texts(self.generate(request, how), request)

        def keep_and_optimize(self) -> None:
            if self.student_engine.is_gradient_accumulation_boundary():
                read_gradient = deepspeed.utils.safe_get_full_grad
                named = self.student_engine.module.named_parameters()
                gate.keep_gradient((name, read_gradient(p)) for name, p in named)
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

    return Told


def _take_texts(made: Any, request: Any) -> list[list[int]]:
    """Return the tokens of each text, without what pads it."""
    begin = request.prompt_ids.shape[1]
    return take(made.input_ids[:, begin:], made.attention_mask[:, begin:])


def _find_port() -> str:
    from ds_kd.parallel.rendezvous import free_port

    return str(free_port())


def _write_opsd_config(job: Job) -> Path:
    """Write the two files of an OPSD run, as its smoke test on one device has them, and the
    prompts, and return the first file."""
    kind = {"fp32": "float32", "bf16": "bfloat16"}[job.dtype]
    prompts, zero, config = (job.place / f"{n}.json" for n in ("prompts", "zero", "opsd"))
    asked = [json.dumps({"prompt": row["messages"][:-1]}) for row in read(job)]
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
            "num_train_epochs": ENDLESS, "logging_steps": ENDLESS, "save_steps": ENDLESS,
        },
        "data": {"path": str(prompts), "prompt_field": "prompt", "shuffle": False},
        "deepspeed_config": str(zero),
    }), "utf-8")  # fmt: skip
    return config
