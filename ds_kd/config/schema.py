"""The config's schema: every key with its default, kind, bounds and meaning.

It is the documentation as well, see `key_table`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_kd.config.components import Target
from ds_kd.config.yaml_source import Source


def key(default: Any, doc: str, kind: str, /, **bounds: Any) -> Any:
    """A documented field: `kind` is int, number, bool, str, mapping, target, section, choice or
    any."""
    meta = {"doc": doc, "kind": kind, **bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


_SEED = 2**62  # torch takes 64 bits, and each rank adds its number


@dataclass
class StepScheduler:
    global_batch_size: int = key(32, "samples per optimizer step, over all ranks", "int", low=1)
    local_batch_size: int = key(1, "samples per micro-batch on one rank", "int", low=1)
    num_epochs: int = key(1, "passes over the training data", "int", low=1)
    max_steps: int | None = key(
        None, "stop after so many optimizer steps; 0 validates and trains nothing", "int", low=0
    )
    val_every_steps: int | None = key(
        None, "validate every so many optimizer steps, and after the last", "int", low=1
    )
    ckpt_every_steps: int | None = key(
        None, "checkpoint every so many optimizer steps, and after the last; see every_minutes",
        "int", low=1,
    )  # fmt: skip
    max_skipped_steps: int = key(
        0, "steps of a run that may be left out as their loss or gradient is not finite", "int",
        low=0,
    )  # fmt: skip
    val_at_start: bool = key(False, "validate before the first step too", "bool")
    validate_teacher: bool = key(
        True,
        "at kd_ratio 0: load a named teacher to measure the student against it in validation",
        "bool",
    )


@dataclass
class DistEnv:
    backend: str = key(
        "nccl",
        "collective library; nccl becomes gloo where there is no CUDA",
        "choice",
        among=("nccl", "gloo"),
    )
    timeout_minutes: float = key(
        10.0, "how long a collective waits for a missing rank", "number", above=0, high=10_080
    )


@dataclass
class Rng:
    _target_: str | None = key(None, "accepted for NeMo-AutoModel's sake", "nemo")
    seed: int = key(1111, "of shuffling, dropout and initialisation", "int", low=0, high=_SEED)
    ranked: bool = key(True, "each rank draws its own dropout masks", "bool")


@dataclass
class Checkpoint:
    enabled: bool = key(True, "save checkpoints and resume from them", "bool")
    checkpoint_dir: str = key(
        "checkpoints/", "directory of the run; the same directory resumes", "str"
    )
    model_save_format: str = key(
        "safetensors", "format of the exported student", "choice", among=("safetensors",)
    )
    save_consolidated: str = key(
        "final", "Hugging Face student: true/final at the end, every with each checkpoint, "
        "false not at all",
        "choice", among=("false", "true", "final", "every"),
    )  # fmt: skip
    is_async: bool = key(
        False, "only false: a checkpoint is whole before the next step", "bool", among=(False,)
    )
    every_minutes: float = key(
        30.0, "checkpoint when the last one is so old, whatever ckpt_every_steps says; 0 never",
        "number", low=0,
    )  # fmt: skip
    keep_last: int | None = key(
        None, "checkpoints that stay; by default all, or 2 without ckpt_every_steps", "int", low=1
    )
    keep_best: int = key(
        1, "with keep_last: so many of the lowest validation loss stay besides", "int", low=0
    )
    on_failed_save: str = key(
        "continue", "what a run does that cannot write a checkpoint (full disk)", "choice",
        among=("continue", "stop"),
    )  # fmt: skip


@dataclass
class Distributed:
    _target_: str | None = key(None, "accepted; ZeRO-3 takes the place of FSDP2", "nemo")
    strategy: str | None = key(None, "accepted; ZeRO-3 takes the place of FSDP2", "any")
    dp_size: int | None = key(
        None,
        "data-parallel ranks, for checks and plans; a run has all that are started",
        "int",
        low=1,
    )
    dp_replicate_size: int | None = key(None, "only 1", "parallel")
    tp_size: int | None = key(None, "only 1", "parallel")
    cp_size: int | None = key(None, "only 1", "parallel")
    pp_size: int | None = key(None, "only 1", "parallel")
    ep_size: int | None = key(None, "only 1", "parallel")
    sequence_parallel: bool = key(False, "only false", "bool", among=(False,))
    activation_checkpointing: bool = key(
        False, "recompute the student's activations in backward", "bool"
    )


@dataclass
class LRScheduler:
    name: str = key("linear", "schedule by transformers' name", "choice", among=(
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ))  # fmt: skip
    num_warmup_steps: int = key(0, "optimizer steps of linear warm-up", "int", low=0)
    warmup_ratio: float | None = key(
        None,
        "warm-up as a share of all steps, in place of num_warmup_steps",
        "number",
        low=0,
        high=1,
    )
    scheduler_specific_kwargs: dict = key(dict, "further arguments of that schedule", "mapping")


@dataclass
class DeepSpeed:
    student: Any = key(
        None, "ZeRO file (path or mapping) of the student; plain ZeRO-3 by default", "any"
    )
    teacher: Any = key(
        None, "ZeRO file (path or mapping) of the teacher; plain ZeRO-3 by default", "any"
    )


@dataclass
class PackedSequence:
    packed_sequence_size: int = key(
        0,
        "tokens a pack of whole samples holds; batch sizes then count packs; 0 packs nothing",
        "int",
        low=0,
    )
    split_across_pack: bool = key(False, "only false: samples stay whole", "bool", among=(False,))


@dataclass
class Peft:
    _target_: str | None = key(None, "accepted for NeMo-AutoModel's sake", "nemo")
    match_all_linear: bool = key(False, "adapt every linear map but the head", "bool")
    target_modules: list = key(
        list, "maps to adapt, `*` for anything; `*_proj` where nothing is chosen", "names"
    )
    exclude_modules: list = key(list, "maps not to adapt, of all there are", "names")
    dim: int = key(8, "rank of the adapters", "int", low=1)
    alpha: float = key(32, "they are scaled by alpha / dim", "number", above=0)
    dropout: float = key(0.0, "on an adapter's input", "number", low=0, high=1)
    dropout_position: str = key(
        "pre", "only pre, unless dropout is 0", "choice", among=("pre", "post")
    )
    lora_dtype: str | None = key(None, "only null: the student's", "choice", among=("null",))
    moe_rank_scaling: bool = key(False, "only false", "bool", among=(False,))
    lora_A_init: str = key("xavier", "normal; or Kaiming's", "choice", among=("xavier", "uniform"))
    use_dora: bool = key(False, "DoRA: a trained length of each output besides", "bool")
    use_triton: bool = key(False, "accepted; peft's PyTorch code is used", "bool")
    use_memory_efficient_lora: bool = key(True, "accepted; peft's PyTorch code is used", "bool")


@dataclass
class Compile:
    enabled: bool = key(False, "torch.compile the transformer layers; or `compile: true`", "bool")
    mode: str = key(
        "default", "of torch.compile", "choice",
        among=("default", "max-autotune", "max-autotune-no-cudagraphs"),
    )  # fmt: skip
    dynamic: bool = key(True, "one version for all lengths; false makes one for each", "bool")
    fullgraph: bool = key(False, "only false: attention stays outside", "bool", among=(False,))
    backend: str = key(
        "inductor", "of torch.compile", "choice",
        among=("inductor", "cudagraphs", "aot_eager", "eager"),
    )  # fmt: skip


@dataclass
class Slurm:
    job_name: str = key("ds_kd", "name of the job", "str")
    nodes: int = key(1, "machines", "int", low=1)
    ntasks_per_node: int = key(1, "ranks on each: one per accelerator", "int", low=1)
    gpus_per_node: int | None = key(None, "accelerators asked for on each", "int", low=1)
    cpus_per_task: int | None = key(None, "cores of a rank", "int", low=1)
    time: str | None = key(None, "limit of one attempt, in quotes: `'04:00:00'`", "str")
    account: str | None = key(None, "who pays", "str")
    partition: str | None = key(None, "queue", "str")
    log_dir: str = key(".", "of the job's log and each attempt's", "str")
    container_image: str | None = key(None, "image to run in (pyxis)", "str")
    container_mounts: list = key(list, "`HOST:CONTAINER` directories of it", "names")
    env_vars: dict = key(dict, "environment variables of the job", "mapping")
    sbatch_options: list = key(list, "any other options of sbatch", "names")


@dataclass
class TensorBoard:
    enabled: bool = key(True, "write TensorBoard events", "bool")
    log_dir: str | None = key(
        None, "of events and metrics.jsonl; <checkpoint_dir>/tensorboard by default", "str"
    )


_LOADER = "torchdata.stateful_dataloader.StatefulDataLoader"
MODEL = "transformers.AutoModelForCausalLM.from_pretrained"
_GIVEN_TO_LOADER = ("dataset", "batch_sampler", "generator")
LOADER_FLAGS = ("shuffle", "drop_last", "group_by_length")
#: Taken by ds_kd from a data set's section, see `ds_kd.data.own`.
_LABELS = {"labels": ("shifted", "unshifted")}
_COLLATE = {"collate_fn": "ds_kd.data.collate.default_collater"}


@dataclass
class RunConfig:
    model: Target = key(
        None,
        "the student: from_pretrained arguments",
        "target",
        target=MODEL,
        required=True,
        example="model.pretrained_model_name_or_path: Qwen/Qwen3-0.6B",
    )
    teacher_model: Target | None = key(
        None,
        "the teacher: likewise; not needed at kd_ratio 0, where only validation looks at it",
        "target",
        target=MODEL,
    )
    offload_teacher_model: bool = key(
        False, "the teacher's shards stay in the host's memory", "bool"
    )
    dataset: Target = key(
        None,
        "training data",
        "target",
        given=("tokenizer",),
        words=_LABELS,
        calls=("ds_kd.data.",),
        required=True,
        example="dataset._target_: ds_kd.data.squad.make_squad_dataset, and dataset_name",
    )
    kd_ratio: float = key(
        0.5, "α: 0 is pure cross-entropy, 1 pure distillation", "number", low=0, high=1
    )
    kd_loss_fn: Target = key(
        None,
        "distillation loss: temperature, ignore_index, fp32_upcast, chunk_size",
        "target",
        target="ds_kd.losses.KDLoss",
        calls=("ds_kd.losses.KDLoss",),
        default={},
    )
    peft: Peft | None = key(
        None, "LoRA: the student's weights stay, small adapters are trained", "section",
        section=Peft,
    )  # fmt: skip
    loss_fn: Target = key(
        None,
        "cross-entropy: ignore_index, fp32_upcast",
        "target",
        target="ds_kd.losses.MaskedCrossEntropy",
        calls=("ds_kd.losses.MaskedCrossEntropy",),
        default={},
    )
    optimizer: Target = key(
        None,
        "an element-wise optimizer and its arguments; torch.optim.AdamW by default",
        "target",
        target="torch.optim.AdamW",
        given=("params", "model_params"),
        calls=("torch.optim.", "deepspeed.ops."),
        default={"lr": 1e-5},
    )
    lr_scheduler: LRScheduler | None = key(
        None, "learning-rate schedule; constant by default", "section", section=LRScheduler
    )
    clip_grad_norm: float | None = key(
        None, "largest gradient norm: a number or {max_norm: number}; off by default", "clip"
    )
    step_scheduler: StepScheduler = key(
        StepScheduler, "batch sizes and when things happen", "section", section=StepScheduler
    )
    dataloader: Target = key(
        None,
        "loader arguments: collate_fn, shuffle, drop_last, group_by_length, num_workers",
        "target",
        target=_LOADER,
        default=_COLLATE,
        flags=LOADER_FLAGS,
        given=_GIVEN_TO_LOADER,
        calls=(_LOADER,),
    )
    packed_sequence: PackedSequence = key(
        PackedSequence, "samples packed instead of padded", "section", section=PackedSequence
    )
    validation_dataset: Target | None = key(
        None,
        "validation data; without it no validation",
        "target",
        example="validation_dataset._target_: ds_kd.data.squad.make_squad_dataset",
        given=("tokenizer",),
        words=_LABELS,
        calls=("ds_kd.data.",),
    )
    validation_share: float | None = key(
        None,
        "share of the dataset's samples that is not trained on but validated with, chosen by "
        "rng.seed; in place of validation_dataset",
        "number", above=0, high=0.5,
    )  # fmt: skip
    validation_dataloader: Target = key(
        None,
        "likewise for validation; batch_size is local_batch_size by default",
        "target",
        target=_LOADER,
        default=_COLLATE,
        flags=LOADER_FLAGS,
        given=_GIVEN_TO_LOADER,
        calls=(_LOADER,),
    )
    dist_env: DistEnv = key(DistEnv, "how ranks talk", "section", section=DistEnv)
    rng: Rng = key(Rng, "random numbers", "section", section=Rng)
    seed: int | None = key(None, "newer spelling of rng.seed", "int", low=0, high=_SEED)
    checkpoint: Checkpoint = key(Checkpoint, "what is kept", "section", section=Checkpoint)
    distributed: Distributed = key(
        Distributed, "the guide's section; only what ZeRO-3 knows", "section", section=Distributed
    )
    compile: Compile = key(Compile, "fused pointwise work", "section", section=Compile)
    deepspeed: DeepSpeed = key(
        DeepSpeed, "ZeRO files of the two engines", "section", section=DeepSpeed
    )
    tensorboard: TensorBoard = key(TensorBoard, "logging", "section", section=TensorBoard)
    slurm: Slurm | None = key(
        None, "what launch/submit.py asks SLURM for", "section", section=Slurm
    )
    wandb: dict | None = key(None, "arguments of wandb.init; off by default", "mapping")
    recipe: Any = key(None, "accepted and ignored", "any")
    text: str = ""
    notes: list[str] = field(default_factory=list)
    source: Source = field(default_factory=Source)

    @property
    def validates(self) -> bool:
        """Whether there is something to validate with."""
        return self.validation_dataset is not None or self.validation_share is not None

    @property
    def loads_teacher(self) -> bool:
        """Whether a named teacher is loaded: to train with, or to be measured against."""
        measures = self.step_scheduler.validate_teacher and self.validates
        return self.teacher_model is not None and (self.kd_ratio > 0 or measures)

    @property
    def tensorboard_dir(self) -> str:
        return self.tensorboard.log_dir or str(Path(self.checkpoint.checkpoint_dir) / "tensorboard")


def keys_of(cls: Any) -> list[tuple[str, Any]]:
    return [(f.name, f.metadata) for f in dataclasses.fields(cls) if f.metadata]


def default_of(cls: Any, name: str) -> Any:
    """What a key is where nothing is written; {} for a section."""
    found = next(f for f in dataclasses.fields(cls) if f.name == name)
    if found.default is not dataclasses.MISSING:
        return found.default
    return [] if found.default_factory is list else {}
