"""From a config to a `Trainer`. With `launch/kd.py` the only reader of the config: below this,
components take plain values."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_kd import engines, lora, models, probes
from ds_kd.checkpoint import FINAL, LATEST, Checkpointer
from ds_kd.config import check_world, fingerprint
from ds_kd.data.packing import PackedDataset, lengths_of
from ds_kd.data.sampler import GlobalBatchSampler, WithFiller
from ds_kd.distillation import DistillationLoss
from ds_kd.distributed import World, on_rank0, rank0_first, seconds_after_sigterm
from ds_kd.metrics import Metrics
from ds_kd.optimizer import build_optimizer, build_schedule, placed
from ds_kd.pretrained import fix_rope, load_model, name_of, tokenizer_of, training_dtype
from ds_kd.schedule import Schedule
from ds_kd.schema import LOADER_FLAGS, RunConfig
from ds_kd.state import TrainState, seed_rank
from ds_kd.targets import ConfigError, Target, as_config_error, instantiate
from ds_kd.trainer import Trainer
from ds_kd.zero_config import load_zero_config, offloaded, offloads_optimizer

_HASHED_SAMPLES = 64


def build(
    cfg: RunConfig,
    world: World,
    allow: tuple[str, ...] = (),
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Build everything a run needs.

    Args:
        cfg: a checked config.
        world: this process's place in the job.
        allow: prefixes of `_target_` names opened on the command line.
        asked_to_stop: whether this rank was asked to stop after its step.

    Raises:
        ConfigError: something the config names does not exist or does not fit; names the key.
    """
    check_world(cfg, world.size)
    seed_rank(cfg.rng.seed, world.rank, cfg.rng.ranked)
    distils = cfg.kd_ratio > 0
    tokenizer = tokenizer_of(cfg.model, world)
    loader, sampler = _loader(cfg, cfg.dataset, cfg.dataloader, tokenizer, world, allow, True)
    validation = None
    if cfg.validation_dataset is not None:
        validation, _ = _loader(
            cfg, cfg.validation_dataset, cfg.validation_dataloader, tokenizer, world, allow, False
        )
    schedule = Schedule(
        sampler.steps_per_epoch,
        cfg.step_scheduler.num_epochs,
        cfg.step_scheduler.max_steps,
        cfg.step_scheduler.val_every_steps,
        cfg.step_scheduler.ckpt_every_steps,
    )
    # What only rank 0 opens comes before anything that all ranks do together.
    metrics = _metrics(cfg, schedule, world)
    checkpointer = _checkpointer(cfg, tokenizer, loader.dataset.dataset, world)
    teacher = (
        _teacher(cfg, cfg.teacher_model, world, allow) if distils and cfg.teacher_model else None
    )
    student = _student(cfg, teacher, tokenizer, schedule, world, allow)
    return Trainer(
        student=student,
        teacher=teacher,
        loader=loader,
        validation_loader=validation,
        kd_ratio=cfg.kd_ratio,
        schedule=schedule,
        metrics=metrics,
        checkpointer=checkpointer,
        state=TrainState(),
        world=world,
        validate_first=cfg.step_scheduler.val_at_start,
        max_skipped=cfg.step_scheduler.max_skipped_steps,
        asked_to_stop=asked_to_stop,
    )


def _engine_config(
    cfg: RunConfig, target: Target, zero: dict[str, Any], world: World, clip: float | None
) -> dict[str, Any]:
    steps = cfg.step_scheduler
    dtype = training_dtype(target)
    accumulation = steps.global_batch_size // (steps.local_batch_size * world.size)
    return engines.engine_config(zero, dtype, steps.local_batch_size, accumulation, clip)


def _teacher(cfg: RunConfig, target: Target, world: World, allow: tuple[str, ...]) -> Any:
    zero = load_zero_config(cfg.deepspeed.teacher, "deepspeed.teacher", (0, 3))
    if cfg.offload_teacher_model:
        zero = offloaded(zero)
    config = _engine_config(cfg, target, zero, world, None)
    module = models.Teacher(load_model(target, config, _packs(cfg), allow))
    engine = engines.build_teacher(module, config)
    _check_model(cfg, target, engine, world)
    _compile(cfg, module.model)
    return engine


def _student(
    cfg: RunConfig,
    teacher: Any | None,
    tokenizer: Any,
    schedule: Schedule,
    world: World,
    allow: tuple[str, ...],
) -> Any:
    zero = load_zero_config(cfg.deepspeed.student, "deepspeed.student")
    config = _engine_config(cfg, cfg.model, zero, world, cfg.clip_grad_norm)
    model = load_model(cfg.model, config, _packs(cfg), allow, adapter_of(cfg))
    if cfg.distributed.activation_checkpointing:
        as_config_error(
            "distributed.activation_checkpointing",
            True,
            lambda: model.gradient_checkpointing_enable({"use_reentrant": False}),
            "a model that can recompute its activations",
        )
    vocab_size = None
    if teacher is not None:
        assert cfg.teacher_model is not None
        teacher_tokenizer = tokenizer_of(cfg.teacher_model, world)
        rows = [m.config.get_text_config().vocab_size for m in (model, teacher.module.model)]
        vocab_size = as_config_error(
            "teacher_model",
            name_of(cfg.teacher_model),
            lambda: models.common_vocab_size(tokenizer, teacher_tokenizer, *rows),
            "a teacher with the student's tokenizer",
        )
    try:
        ce, kd = (instantiate(part, allow) for part in (cfg.loss_fn, cfg.kd_loss_fn))
        loss = DistillationLoss(ce, kd, cfg.kd_ratio, vocab_size)
    except ValueError as error:  # begins with the argument's name
        raise ConfigError([f"loss_fn, kd_loss_fn: {error}"]) from error
    module = models.Student(model, loss, teacher.module if teacher is not None else None)
    optimizer = cfg.optimizer
    if world.device.type != "cpu":
        optimizer = placed(optimizer, offloads_optimizer(zero))
    engine = as_config_error(
        "optimizer",
        cfg.optimizer.target,
        lambda: engines.build_student(
            module,
            config,
            lambda parameters: build_optimizer(optimizer, parameters, allow, cfg.optimizer),
            build_schedule(cfg.lr_scheduler, schedule.total_steps),
        ),
        "an element-wise optimizer",
    )
    _check_model(cfg, cfg.model, engine, world)
    _compile(cfg, model)
    engine.train()
    return engine


def adapter_of(cfg: RunConfig) -> Callable[[Any], None] | None:
    """What puts the adapter of the `peft` section into a model."""
    wanted = cfg.peft
    if wanted is None:
        return None

    def adapt(model: Any) -> None:
        chosen = wanted.target_modules, wanted.exclude_modules
        names = as_config_error(
            "peft",
            {"target_modules": chosen[0], "exclude_modules": chosen[1]},
            lambda: lora.linear_maps(model, *chosen, wanted.match_all_linear),
            f"names of linear maps of {name_of(cfg.model)}",
        )
        lora.add_adapter(
            model,
            names,
            wanted.dim,
            wanted.alpha,
            wanted.dropout,
            wanted.use_dora,
            wanted.lora_A_init,
            cfg.rng.seed,
            name_of(cfg.model),
            cfg.model.kwargs.get("revision"),
        )

    return adapt


def _packs(cfg: RunConfig) -> bool:
    return cfg.packed_sequence.packed_sequence_size > 0


def _check_model(cfg: RunConfig, target: Target, engine: Any, world: World) -> None:
    """Check what only the loaded model can tell, and say what it makes the run do."""
    if (said := fix_rope(engine.module.model)) and world.is_main:
        print(f"{target.key}: {said}", flush=True)
    checks = [(probes.check_head, "a linear head")]
    if _packs(cfg):
        checks.append((probes.check_packing, "a model that keeps packed samples apart"))
    for check, expected in checks:
        probe = functools.partial(check, engine, world.device, target.key)
        as_config_error(target.key, name_of(target), probe, expected)


def _compile(cfg: RunConfig, model: Any) -> None:
    wanted = cfg.compile
    if wanted.enabled:
        models.compile_layers(
            model, mode=wanted.mode, dynamic=wanted.dynamic, backend=wanted.backend
        )


def _samples(
    cfg: RunConfig, dataset: Target, tokenizer: Any, world: World, allow: tuple[str, ...]
) -> Any:
    """The data set; packs where the YAML wants them."""
    names = ("dataset_name", "path_or_dataset", "path_or_dataset_id")
    name = next((name for name in names if name in dataset.kwargs), None)
    rows = as_config_error(
        f"{dataset.key}.{name}" if name else dataset.key,
        dataset.kwargs[name] if name else dataset.target,
        lambda: rank0_first(lambda: instantiate(dataset, allow, tokenizer=tokenizer), world),
        "a data set",
    )
    if not _packs(cfg):
        return rows
    size = cfg.packed_sequence.packed_sequence_size
    return as_config_error(
        "packed_sequence.packed_sequence_size",
        size,
        lambda: PackedDataset(rows, size, cfg.rng.seed),
        f"room for every sample of {dataset.key}",
    )


def _loader(
    cfg: RunConfig,
    dataset: Target,
    loader: Target,
    tokenizer: Any,
    world: World,
    allow: tuple[str, ...],
    training: bool,
) -> tuple[Any, GlobalBatchSampler]:
    """The data set, cut into this rank's micro-batches."""
    rows = _samples(cfg, dataset, tokenizer, world, allow)
    steps, kwargs = cfg.step_scheduler, dict(loader.kwargs)
    local = steps.local_batch_size
    if not training:
        local = kwargs.pop("batch_size", None) or local
    shuffle, drop_last, grouped = (bool(kwargs.pop(name, False)) for name in LOADER_FLAGS)
    if kwargs.get("collate_fn") is None:
        kwargs["collate_fn"] = "ds_kd.data.collate.default_collater"

    def make() -> tuple[Any, GlobalBatchSampler]:
        sampler = GlobalBatchSampler(
            len(rows),
            steps.global_batch_size if training else local * world.size,
            local,
            world.rank,
            world.size,
            shuffle=shuffle,
            seed=cfg.rng.seed,
            drop_last=drop_last,
            lengths=lengths_of(rows) if grouped and not _packs(cfg) else None,
        )
        built = instantiate(
            Target(loader.target, kwargs, loader.key),
            allow,
            LOADER_FLAGS,
            dataset=WithFiller(rows),
            batch_sampler=sampler,
            # Of its own: an iterator draws from it when made, and dropout must not notice.
            generator=torch.Generator().manual_seed(cfg.rng.seed),
        )
        return built, sampler

    made: tuple[Any, GlobalBatchSampler] = as_config_error(
        loader.key, loader.kwargs, make, "arguments that fit the data"
    )
    return made


def _metrics(cfg: RunConfig, schedule: Schedule, world: World) -> Metrics | None:
    """On rank 0; what goes wrong there reaches all ranks."""
    made: list[Metrics] = []

    def make() -> None:
        made.append(
            Metrics(
                Path(cfg.tensorboard_dir),
                cfg.tensorboard.enabled,
                cfg.text,
                cfg.wandb,
                schedule.total_steps,
            )
        )

    def everywhere() -> None:
        try:
            on_rank0(make, world)
        except ValueError as error:  # wandb's
            raise ConfigError([str(error)]) from error

    as_config_error(
        "tensorboard.log_dir", cfg.tensorboard_dir, everywhere, "a directory that can be written"
    )
    return made[0] if made else None


def _checkpointer(
    cfg: RunConfig, tokenizer: Any, samples: Any, world: World
) -> Checkpointer | None:
    wanted = cfg.checkpoint
    if not wanted.enabled:
        return None
    directory = Path(wanted.checkpoint_dir)
    as_config_error(
        "checkpoint.checkpoint_dir",
        wanted.checkpoint_dir,
        lambda: on_rank0(lambda: os.makedirs(directory, exist_ok=True), world),
        "a directory that can be written",
    )
    return Checkpointer(
        directory,
        world,
        tokenizer,
        wanted.save_consolidated,
        wanted.keep_last,
        {**fingerprint(cfg), "training data": _digest(samples)},
        keep_best=wanted.keep_best,
        stops_on_failed_save=wanted.on_failed_save == "stop",
        patience=seconds_after_sigterm(),
    )


def _digest(samples: Any) -> str:
    """How many samples there are and a hash of some of them, spread over all."""
    count = len(samples)
    tokens = [samples[k]["input_ids"] for k in range(0, count, max(1, count // _HASHED_SAMPLES))]
    return f"{count} samples, {hashlib.sha256(repr(tokens).encode()).hexdigest()[:12]}"


def closing_message(cfg: RunConfig, step: int, finished: bool) -> str:
    """Where the result is and what to type next."""
    directory = Path(cfg.checkpoint.checkpoint_dir)
    if not finished:
        onward = f"the same command goes on from {directory / LATEST}"
        kept = onward if cfg.checkpoint.enabled else "nothing is kept, as checkpoints are off"
        return f"preempted at step {step}; {kept}"
    if not cfg.checkpoint.enabled:
        return "done; nothing is kept, as checkpoints are off"
    if cfg.checkpoint.save_consolidated == "false":
        student = f"python launch/export.py {directory / LATEST} OUT writes it for transformers"
    else:
        student = f"student: {directory / FINAL} (AutoModelForCausalLM.from_pretrained loads it)"
    return f"checkpoint: {directory / LATEST}\n{student}"
