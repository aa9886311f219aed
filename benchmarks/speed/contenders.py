"""One optimizer step of distillation, done by ds_kd and by others on the same samples.

Each contender is a context manager of a `step(samples) -> loss`: collating, both forwards, the
loss, backward and AdamW. The loss is the mean over supervised tokens of 1/2·CE + 1/2·KL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Step = Callable[[list[dict[str, Any]]], float]
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """The models and samples that every contender of one cell works on.

    Args:
        teacher, student: Hugging Face directories.
        dtype: of both models.
        micro_batch: samples per forward; a pack of ds_kd has as much room as they take together.
        packs: ds_kd packs the samples.
        shares: samples in a pack share their beginnings.
        alpha: kd_ratio.
    """

    teacher: Path
    student: Path
    dtype: torch.dtype = torch.float32
    micro_batch: int = 2
    packs: bool = False
    shares: bool = False
    pack_size: int = 1024
    alpha: float = 0.5


def _load(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def _chunks(items: list, size: int) -> list[list]:
    return [items[k : k + size] for k in range(0, len(items), size)]


# ---- ds_kd ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Choices of a run, at the defaults of a CPU.

    Args:
        compiled: layers are compiled, the default on an accelerator.
        whole: `teacher.placement: replicate`, the default on an accelerator with room.
        liger: `use_liger_kernel: true` on both models.
    """

    compiled: bool = False
    whole: bool = False
    liger: bool = False


@contextlib.contextmanager
def ds_kd(job: Job, settings: Settings = Settings()) -> Iterator[Step]:
    """Take the trainer's own step on its own engines; this process is one rank of them."""
    from ds_kd.checkpoint.engine.files import state_bytes
    from ds_kd.parallel import world as distributed

    world = distributed.start("nccl" if torch.cuda.is_available() else "gloo", 10)
    teacher, student = _build_engines(job, settings)

    def step(samples: list[dict[str, Any]]) -> float:
        batches = _collate(job, samples)[world.rank :: world.size]
        labels = int(distributed.sum_over([sum(b["num_labels"] for b in batches)], world.data)[0])
        total = torch.zeros((), device=world.device)
        for batch in batches:
            batch = {
                name: value.to(world.device, non_blocking=True)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in batch.items()
            }
            teacher_output = teacher(batch)
            loss, _ = student(batch, teacher_output)
            del teacher_output
            student.backward(loss * (world.data.size / labels), scale_wrt_gas=False)
            total += loss.detach()
        student.step()
        return float(distributed.sum_over(total[None], world.data)[0]) / labels

    if (
        not settings.whole
    ):  # what a rank keeps of sharded models between steps, for the row of the table
        step.state_bytes = state_bytes(teacher.engine) + state_bytes(student)  # type: ignore[attr-defined]
    yield step
    for engine in (student, teacher.engine):
        engine.destroy()


def _build_engines(job: Job, settings: Settings) -> tuple[Any, Any]:
    """Return the teacher and the student's engine, built as a run builds them."""
    from ds_kd.config.checks.zero_file import load_zero_config, place_teacher
    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy
    from ds_kd.losses.divergences import KDLoss
    from ds_kd.models import causal_lm
    from ds_kd.models.attention import attend_by_sample
    from ds_kd.parallel import engines
    from ds_kd.recipe.tuning.kernels import use_liger_kernels
    from ds_kd.teachers.resident import ResidentTeacher

    config = engines.engine_config(load_zero_config(None, "zero"), job.dtype, job.micro_batch)
    whole = place_teacher(None, "replicate", False)
    placed = engines.engine_config(whole, job.dtype, job.micro_batch) if settings.whole else config
    with engines.zero3_init(placed):
        teacher_model = _load(job.teacher, job.dtype)
    attend_by_sample(teacher_model)
    if settings.liger and (reason := use_liger_kernels(teacher_model)):
        raise RuntimeError(f"no kernels of liger-kernel: {reason}")
    teacher = ResidentTeacher(engines.build_teacher(causal_lm.FrozenModel(teacher_model), placed))
    with engines.zero3_init(config):
        student_model = _load(job.student, job.dtype)
    attend_by_sample(student_model)
    if settings.liger:
        use_liger_kernels(student_model)
    loss_fn = DistillationLoss(MaskedCrossEntropy(), KDLoss(), job.alpha)
    student = engines.build_student(
        causal_lm.Student(student_model, loss_fn),
        config,
        lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True),
    )
    student.train()

    # Layers are compiled last, as in a run.
    if settings.compiled:
        causal_lm.compile_layers(teacher_model)
        causal_lm.compile_layers(student_model)
    return teacher, student


def _collate(job: Job, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the micro-batches of a step, packed if the job says so."""
    from ds_kd.data.collate import default_collater
    from ds_kd.data.packing import PackedDataset
    from ds_kd.data.prefixes import SharedDataset

    if not job.packs:
        return [default_collater(part) for part in _chunks(samples, job.micro_batch)]
    packed = (SharedDataset if job.shares else PackedDataset)(samples, job.pack_size)
    return [default_collater([packed[k]]) for k in range(len(packed))]


# ---- the field -----------------------------------------------------------------------------------


def _pad(samples: list[dict[str, Any]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return (input ids, attention mask, shifted labels), padded on the right."""
    length = max(len(s["input_ids"]) for s in samples)
    ids, mask, labels = [], [], []
    for s in samples:
        short = length - len(s["input_ids"])
        ids.append(s["input_ids"] + [0] * short)
        mask.append([1] * len(s["input_ids"]) + [0] * short)
        labels.append(s["labels"] + [-100] * short)
    return tuple(torch.tensor(rows, device=device) for rows in (ids, mask, labels))


@contextlib.contextmanager
def _loop(job: Job, loss_of: Callable[..., torch.Tensor]) -> Iterator[Step]:
    """Take the steps of a plain Hugging Face loop with AdamW.

    Args:
        loss_of: `loss_of(student, teacher, inputs, labels)` returns a sum over supervised tokens;
            labels are `[tokens]`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = _load(job.teacher, job.dtype).to(device).eval().requires_grad_(False)
    student = _load(job.student, job.dtype).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)

    def step(samples: list[dict[str, Any]]) -> float:
        count = sum(label != -100 for s in samples for label in s["labels"])
        total = 0.0
        for part in _chunks(samples, job.micro_batch):
            ids, mask, labels = _pad(part, device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            loss = loss_of(student, teacher, inputs, labels.flatten()) / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    yield step


def _of_logits(job: Job, ce_of: Callable, kd_of: Callable) -> Any:
    """Return a `_loop` whose losses take whole logits `[tokens, vocab]`.

    Args:
        ce_of: `ce_of(student logits, labels)`.
        kd_of: `kd_of(student logits, teacher logits, labels)`.
    """

    def loss_of(student, teacher, inputs, labels):
        with torch.no_grad():
            target = teacher(**inputs).logits.flatten(0, 1)
        logits = student(**inputs).logits.flatten(0, 1)
        return (1 - job.alpha) * ce_of(logits, labels) + job.alpha * kd_of(logits, target, labels)

    return _loop(job, loss_of)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def plain(job: Job) -> Any:
    """Return a loop with CE and KL of whole logits, as a careful user writes them."""

    def kd_of(logits, target, labels):
        valid = labels != -100
        student = F.log_softmax(logits[valid].float(), -1)
        teacher = F.log_softmax(target[valid].float(), -1)
        return F.kl_div(student, teacher, reduction="sum", log_target=True)

    return _of_logits(job, _cross_entropy, kd_of)


def trl_gkd(job: Job) -> Any:
    """Return a loop with the loss of TRL's GKDTrainer, a generalised JSD at beta 0 (forward KL),
    plus CE."""
    from trl.experimental.gkd import GKDTrainer

    def kd_of(logits, target, labels):
        return GKDTrainer.generalized_jsd_loss(
            logits[None],
            target[None],
            labels=labels[None],
            beta=0.0,
            temperature=1.0,
            reduction="sum",
        )

    return _of_logits(job, _cross_entropy, kd_of)


def nemo(job: Job) -> Any:
    """Return a loop with NeMo-AutoModel's own KDLoss and MaskedCrossEntropy."""
    from nemo_automodel.components.loss.kd_loss import KDLoss
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    kd = KDLoss(fp32_upcast=True)
    return _of_logits(
        job,
        MaskedCrossEntropy(reduction="sum"),
        lambda logits, target, labels: kd(logits, target, labels, num_batch_labels=1),
    )


def liger(job: Job) -> Any:
    """Return a loop with Liger Kernel's fused heads, linear cross-entropy and linear JSD at beta 0
    (forward KL). It needs a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    ce_of = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    kd_of = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss_of(student, teacher, inputs, labels):
        with torch.no_grad():
            target = teacher.model(**inputs).last_hidden_state.flatten(0, 1)
        hidden = student.model(**inputs).last_hidden_state.flatten(0, 1)
        weight = student.lm_head.weight
        mean_kd = kd_of(hidden, weight, target, teacher.lm_head.weight, labels)
        kd = mean_kd * (labels != -100).sum()  # it divides by the supervised tokens
        return (1 - job.alpha) * ce_of(weight, hidden, labels) + job.alpha * kd

    return _loop(job, loss_of)


def with_settings(**settings: Any) -> Callable[..., Any]:
    """Return the contender ds_kd with these settings."""
    return functools.partial(ds_kd, settings=Settings(**settings))


CONTENDERS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "ds_kd": (ds_kd, None),
    "ds_kd_shared": (ds_kd, None),
    "ds_kd_compiled": (with_settings(compiled=True), None),
    "ds_kd_whole": (with_settings(compiled=True, whole=True), None),
    "ds_kd_liger": (with_settings(liger=True, whole=True), "liger_kernel"),
    "plain": (plain, None),
    "trl_gkd": (trl_gkd, "trl"),
    "nemo": (nemo, "nemo_automodel"),
    "liger": (liger, "liger_kernel"),
}


def available(names: list[str] | None = None) -> dict[str, Callable[..., Any]]:
    """Return the contenders whose package is installed, ds_kd first."""
    return {
        name: make
        for name, (make, package) in CONTENDERS.items()
        if (names is None or name in names)
        and (package != "liger_kernel" or torch.cuda.is_available())
        and (package is None or importlib.util.find_spec(package) is not None)
    }
