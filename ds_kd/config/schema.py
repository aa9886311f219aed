"""The top level of the config: each key with its type, bounds, unit and a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_kd.config.components import Component
from ds_kd.config.keys import MaxNorm, key
from ds_kd.config.methods.rollouts import Rollouts
from ds_kd.config.methods.teacher_distributed import TeacherDistributed
from ds_kd.config.names import (  # fmt: skip
    OF_CROSS_ENTROPY,
    OF_DATA,
    OF_DIVERGENCE,
    OF_LOADER,
    OF_MODEL,
    OF_OPTIMIZER,
)
from ds_kd.config.sections import (
    MAX_SEED,
    Checkpoint,
    Compile,
    DeepSpeed,
    DistEnv,
    Distributed,
    Evaluation,
    LRScheduler,
    PackedSequence,
    Peft,
    Rng,
    Slurm,
    StepScheduler,
    Teacher,
    TensorBoard,
)  # fmt: skip
from ds_kd.config.task import WITH_TEACHER
from ds_kd.config.text.yaml_source import Source

SHARED_BASE, CACHED = "shared_base", "cached"  # values of teacher.kind
_KEPT_BY_TIME = 2  # newest checkpoints, where no steps are named to save after


@dataclass
class RunConfig:
    model: Component = key(
        None,
        "Names the student; its keys are arguments of from_pretrained.",
        component=replace(OF_MODEL, required=True),
    )
    teacher_model: Component | None = key(
        None,
        "Names the teacher; its keys are arguments of from_pretrained. At kd_ratio 0 only "
        "validation uses it, and it may be absent, as with a cache that has all rows.",
        component=OF_MODEL,
    )
    teacher: Teacher = key(Teacher, "Says where the teacher's distribution comes from.")
    offload_teacher_model: bool = key(False, "Keeps the teacher's shards in the host's memory.")
    dataset: Component = key(
        None, "Names the training data.", component=replace(OF_DATA, required=True)
    )
    kd_ratio: float = key(
        0.5,
        "Sets the weight α of the distillation loss: 0 is pure cross-entropy, 1 pure distillation.",
        "share",
        low=0,
        high=1,
    )
    kd_loss_fn: Component = key(
        None,
        "Sets the distillation loss: name (forward_kl by default; docs/losses.md lists all), its "
        "arguments, temperature, ignore_index, fp32_upcast, chunk_size. A list of such sections, "
        "each with a weight, is their weighted sum.",
        component=OF_DIVERGENCE,
    )
    rollouts: Rollouts | None = key(
        None,
        "Trains on answers that the student writes itself (on-policy; docs/on_policy.md). "
        "kd_loss_fn is then reverse_kl and kd_ratio 1, if they are not given.",
    )
    peft: Peft | None = key(
        None, "Trains small adapters (LoRA) and leaves the student's weights as they are."
    )
    loss_fn: Component = key(
        None,
        "Sets the cross-entropy: ignore_index, fp32_upcast.",
        component=OF_CROSS_ENTROPY,
    )
    optimizer: Component = key(
        None,
        "Chooses an element-wise optimizer and its arguments. By default it is torch.optim.AdamW.",
        component=OF_OPTIMIZER,
    )
    lr_scheduler: LRScheduler | None = key(
        None, "Sets the schedule of the learning rate. By default it is constant."
    )
    clip_grad_norm: MaxNorm | None = key(
        None,
        "Clips the gradient to this norm, a number or {max_norm: number}. By default it is not "
        "clipped.",
        "L2 norm",
    )
    step_scheduler: StepScheduler = key(
        StepScheduler, "Sets batch sizes, and when a run ends, validates and saves."
    )
    dataloader: Component = key(
        None,
        "Sets the training loader: collate_fn, shuffle, drop_last, group_by_length, num_workers.",
        component=OF_LOADER,
    )
    packed_sequence: PackedSequence = key(PackedSequence, "Packs samples instead of padding them.")
    validation_dataset: dict[str, Component] = key(
        dict, "Names validation data: one data set, or `{name: data set, …}` for several.",
        component=replace(OF_DATA, may_be_named=True),
    )  # fmt: skip
    validation_share: float | None = key(
        None, "Validates with this share of the dataset's samples, chosen by rng.seed, in place of "
        "training with them.", "share", above=0, high=0.5,
    )  # fmt: skip
    validation_dataloader: Component = key(
        None,
        "Sets the validation loader. Its batch_size is local_batch_size by default.",
        component=OF_LOADER,
    )
    evaluation: Evaluation | None = key(
        None, "Puts tasks to the student in the run itself, as launch/evaluate.py does afterwards."
    )
    dist_env: DistEnv = key(DistEnv, "Sets how ranks exchange data.")
    rng: Rng = key(Rng, "Sets how random numbers are drawn.")
    seed: int | None = key(None, "Gives the seed, in place of rng.seed.", low=0, high=MAX_SEED)
    checkpoint: Checkpoint = key(Checkpoint, "Sets which checkpoints are saved, where and when.")
    distributed: Distributed = key(
        Distributed,
        "Says how ranks share samples and layers. ZeRO-3 takes the place of NeMo-AutoModel's "
        "strategies.",
    )
    teacher_distributed: TeacherDistributed = key(
        TeacherDistributed, "Says how the teacher lies on the ranks, if not as the student does."
    )
    compile: Compile = key(Compile, "Compiles the transformer layers with torch.compile.")
    deepspeed: DeepSpeed = key(DeepSpeed, "Gives the ZeRO files of the two engines.")
    tensorboard: TensorBoard = key(TensorBoard, "Sets how TensorBoard's events are written.")
    slurm: Slurm | None = key(None, "Describes the job that launch/submit.py asks SLURM for.")
    wandb: dict[str, Any] | None = key(
        None, "Passes arguments to wandb.init. By default nothing is sent to Weights & Biases."
    )
    recipe: Any = key(None, "NeMo-AutoModel's name is accepted and not used.")
    text: str = ""
    notes: list[str] = field(default_factory=list)
    source: Source = field(default_factory=Source)

    @property
    def validates(self) -> bool:
        """Return whether the run has validation data."""
        return bool(self.validation_dataset) or self.validation_share is not None

    @property
    def kd_losses(self) -> list[Component]:
        """Return the distillation loss, or the parts of a weighted sum."""
        return [part for _, part in self.kd_loss_fn.parts] or [self.kd_loss_fn]

    @property
    def rolls_out(self) -> bool:
        """Return whether the student writes some of its samples itself."""
        return self.rollouts is not None and self.rollouts.ratio > 0

    @property
    def asks_teacher(self) -> bool:
        """Return whether there is a teacher, be it for validation or evaluation alone."""
        measures = self.step_scheduler.validate_teacher and self.validates
        tasks = [] if self.evaluation is None else self.evaluation.tasks
        measures = measures or any(entry["task"] == WITH_TEACHER for entry in tasks)
        is_there = self.teacher_model is not None or self.teacher.kind in (SHARED_BASE, CACHED)
        return is_there and (self.kd_ratio > 0 or measures)

    @property
    def loads_teacher(self) -> bool:
        """Return whether a teacher is loaded beside the student."""
        is_read = self.teacher.kind == CACHED and not self.teacher.fill
        return self.asks_teacher and self.teacher_model is not None and not is_read

    @property
    def teacher_tp_size(self) -> int:
        """Return the number of ranks over which the teacher's matrices are cut."""
        return self.teacher_distributed.tp_size or self.distributed.tp_size or 1

    @property
    def reads_cache(self) -> bool:
        """Return whether the teacher's outputs come from a directory."""
        return self.asks_teacher and self.teacher.kind == CACHED

    @property
    def keep_last(self) -> int | None:
        """Return the number of newest checkpoints that stay, or None if all do."""
        # Checkpoints by time alone are for resuming only.
        by_time = self.step_scheduler.ckpt_every_steps is None
        return self.checkpoint.keep_last or (_KEPT_BY_TIME if by_time else None)

    @property
    def tensorboard_dir(self) -> str:
        """Return the directory of the TensorBoard events and of metrics.jsonl."""
        return self.tensorboard.log_dir or str(Path(self.checkpoint.checkpoint_dir) / "tensorboard")
