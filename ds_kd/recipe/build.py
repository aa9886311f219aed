"""From a config to a `Trainer`. With `launch/kd.py` the only reader of the config: below this,
components take plain values."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ds_kd.checkpoint.checkpointer import Checkpointer
from ds_kd.checkpoint.manifest import FINAL, LATEST
from ds_kd.checkpoint.retention import Retention
from ds_kd.checkpoint.run_lock import RunLock
from ds_kd.checkpoint.state import TrainState, seed_rank
from ds_kd.config.checks.zero_file import load_zero_config, offloaded, offloads_optimizer
from ds_kd.config.components import Component, ConfigError, config_error, instantiate, problem
from ds_kd.config.load import check_world, fingerprint
from ds_kd.config.schema import RunConfig
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.contract import check_cross_entropy, check_divergence
from ds_kd.models import causal_lm, lora, probes
from ds_kd.models.model_files import FILES, identity_of
from ds_kd.parallel import engines
from ds_kd.parallel.rendezvous import seconds_after_sigterm
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.data import build_loader, build_samples, packs
from ds_kd.recipe.models import (
    check_lengths,
    config_of,
    fix_rope,
    load_model,
    name_of,
    tokenizer_of,
    training_dtype,
)
from ds_kd.recipe.optimizer import build_optimizer, build_schedule, placed
from ds_kd.teachers.base import Teacher
from ds_kd.teachers.resident import ResidentTeacher
from ds_kd.train.batches import LoaderBatches
from ds_kd.train.metrics import Metrics
from ds_kd.train.schedule import Schedule
from ds_kd.train.trainer import Trainer

_HASHED_SAMPLES = 64
_LENGTH = ("step_scheduler.max_steps", "step_scheduler.num_epochs")


def build(
    cfg: RunConfig,
    world: World,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Build everything a run needs.

    Args:
        cfg: a checked config.
        world: this process's place in the job.
        asked_to_stop: whether this rank was asked to stop after its step.

    Raises:
        ConfigError: something the config names does not exist or does not fit; names the key.
    """
    check_world(cfg, world.data.size)
    seed_rank(cfg.rng.seed, world.rank, cfg.rng.ranked)
    tokenizer = tokenizer_of(cfg.model, world)
    samples, held_out = build_samples(cfg, tokenizer, world)
    loader, _ = build_loader(cfg, samples, cfg.dataloader, world, True)
    validation = {
        name: build_loader(cfg, part, cfg.validation_dataloader, world, False)[0]
        for name, part in held_out.items()
    }
    batches = LoaderBatches(loader)
    schedule = _schedule(cfg, batches.steps_per_epoch)
    # What only rank 0 opens, and what is soon refused, comes before the models.
    metrics = _metrics(cfg, schedule, world)
    checkpointer = _checkpointer(cfg, tokenizer, loader.dataset.dataset, world)
    loss = _loss(cfg, tokenizer, world)
    _check_lengths(cfg, [loader, *validation.values()])

    teacher = _teacher(cfg, world) if cfg.loads_teacher else None
    if cfg.kd_ratio == 0:  # a teacher to measure against must not change what training draws
        seed_rank(cfg.rng.seed, world.rank, cfg.rng.ranked)
    student = _student(cfg, loss, schedule, world)
    if checkpointer is not None:  # by now all files are there
        checkpointer.fingerprint |= _model_files(cfg, world)
    return Trainer(
        student=student,
        teacher=teacher if cfg.kd_ratio > 0 else None,
        batches=batches,
        validation_loaders=validation,
        schedule=schedule,
        metrics=metrics,
        checkpointer=checkpointer,
        state=TrainState(),
        world=world,
        validate_first=cfg.step_scheduler.val_at_start,
        asked_to_stop=asked_to_stop,
        max_skipped=cfg.step_scheduler.max_skipped_steps,
        validation_teacher=teacher,
        save_every_seconds=60 * cfg.checkpoint.every_minutes or None,
    )


def _schedule(cfg: RunConfig, steps_per_epoch: int) -> Schedule:
    steps = cfg.step_scheduler
    return Schedule(
        steps_per_epoch,
        steps.num_epochs,
        steps.max_steps,
        steps.val_every_steps,
        steps.ckpt_every_steps,
        steps.patience,
    )


def _loss(cfg: RunConfig, tokenizer: Any, world: World) -> DistillationLoss:
    """The student's loss, over the ids that it shares with the teacher."""
    vocab_size = None
    if cfg.loads_teacher:
        assert cfg.teacher_model is not None
        teacher_tokenizer = tokenizer_of(cfg.teacher_model, world)
        parts = (cfg.model, cfg.teacher_model)
        rows = [config_of(part).get_text_config().vocab_size for part in parts]
        expected = "a teacher with the student's tokenizer"
        if cfg.kd_ratio == 0:
            expected += ", or step_scheduler.validate_teacher: false"
        with config_error("teacher_model", name_of(cfg.teacher_model), expected):
            vocab_size = causal_lm.common_vocab_size(tokenizer, teacher_tokenizer, *rows)
    ce = _part_of_loss(cfg.loss_fn, check_cross_entropy, world)
    divergence = _part_of_loss(cfg.kd_loss_fn, check_divergence, world)
    return DistillationLoss(ce, divergence, cfg.kd_ratio, vocab_size)


def _part_of_loss(component: Component, check: Callable[[Any], None], world: World) -> Any:
    """The loss of a section, tried against its contract, on this rank's device."""
    try:
        loss = instantiate(component)
        check(loss)
    except ValueError as error:
        raise ConfigError([f"{component.key}: {component.name}: {error}"]) from error
    return loss.to(world.device) if isinstance(loss, torch.nn.Module) else loss


def _engine_config(
    cfg: RunConfig, component: Component, zero: dict[str, Any], world: World, clip: float | None
) -> dict[str, Any]:
    steps = cfg.step_scheduler
    dtype = training_dtype(component)
    accumulation = steps.global_batch_size // (steps.local_batch_size * world.data.size)
    return engines.engine_config(zero, dtype, steps.local_batch_size, accumulation, clip)


def _teacher(cfg: RunConfig, world: World) -> Teacher:
    component = cfg.teacher_model
    assert component is not None
    zero = load_zero_config(cfg.deepspeed.teacher, "deepspeed.teacher", (0, 3))
    if cfg.offload_teacher_model:
        zero = offloaded(zero)
    config = _engine_config(cfg, component, zero, world, None)
    module = causal_lm.FrozenModel(load_model(component, config, packs(cfg)))
    engine = engines.build_teacher(module, config)
    _check_model(cfg, component, engine, world)
    _compile(cfg, module.model)
    return ResidentTeacher(engine)


def _student(
    cfg: RunConfig,
    loss: DistillationLoss,
    schedule: Schedule,
    world: World,
) -> Any:
    zero = load_zero_config(cfg.deepspeed.student, "deepspeed.student")
    config = _engine_config(cfg, cfg.model, zero, world, cfg.clip_grad_norm)
    model = load_model(cfg.model, config, packs(cfg), adapter_of(cfg))
    if cfg.distributed.activation_checkpointing:
        expected = "a model that can recompute its activations"
        with config_error("distributed.activation_checkpointing", True, expected):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    module = causal_lm.Student(model, loss)
    optimizer = cfg.optimizer
    if world.device.type != "cpu":
        optimizer = placed(optimizer, offloads_optimizer(zero))
    with config_error("optimizer", cfg.optimizer.name, "an element-wise optimizer"):
        engine = engines.build_student(
            module,
            config,
            lambda parameters: build_optimizer(optimizer, parameters, cfg.optimizer),
            build_schedule(cfg.lr_scheduler, max(1, schedule.total_steps)),
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
        given = {"target_modules": chosen[0], "exclude_modules": chosen[1]}
        with config_error("peft", given, f"names of linear maps of {name_of(cfg.model)}"):
            names = lora.linear_maps(model, *chosen, wanted.match_all_linear)
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


def _check_model(cfg: RunConfig, component: Component, engine: Any, world: World) -> None:
    """Check what only the loaded model can tell, and say what it makes the run do."""
    if (said := fix_rope(engine.module.model)) and world.is_main:
        print(f"{component.key}: {said}", flush=True)
    checks = [(probes.check_head, "a linear head")]
    if packs(cfg):
        checks.append((probes.check_packing, "a model that keeps packed samples apart"))
    for check, expected in checks:
        with config_error(component.key, name_of(component), expected):
            check(engine, world.device, component.key)


def _check_lengths(cfg: RunConfig, loaders: list[Any]) -> None:
    """Refuse samples that a model would not treat like the others."""
    used = [cfg.model, *([cfg.teacher_model] if cfg.loads_teacher and cfg.teacher_model else [])]
    for component, loader in itertools.product(used, loaders):
        with config_error(component.key, name_of(component), "a model that treats samples alike"):
            check_lengths(config_of(component), loader.dataset.dataset)  # without the filler


def _compile(cfg: RunConfig, model: Any) -> None:
    wanted = cfg.compile
    if wanted.enabled:
        causal_lm.compile_layers(
            model, mode=wanted.mode, dynamic=wanted.dynamic, backend=wanted.backend
        )


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

    expected = "a directory that can be written"
    with config_error("tensorboard.log_dir", cfg.tensorboard_dir, expected):
        everywhere()
    return made[0] if made else None


@contextlib.contextmanager
def locked(cfg: RunConfig, world: World) -> Iterator[RunLock | None]:
    """Keep the checkpoint directory for this run alone; None where no checkpoints are kept.

    Raises:
        ConfigError: another run has it, or it cannot be written.
    """
    if not cfg.checkpoint.enabled:
        yield None
        return
    directory = Path(cfg.checkpoint.checkpoint_dir)
    lock = RunLock(directory)

    def take() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        lock.take()

    expected = "a directory that can be written and that no other run uses"
    with config_error("checkpoint.checkpoint_dir", cfg.checkpoint.checkpoint_dir, expected):
        on_rank0(take, world)
    try:
        yield lock
    finally:
        lock.release()


def _checkpointer(
    cfg: RunConfig, tokenizer: Any, samples: Any, world: World
) -> Checkpointer | None:
    wanted = cfg.checkpoint
    if not wanted.enabled:
        return None
    keep_last = wanted.keep_last
    if keep_last is None and cfg.step_scheduler.ckpt_every_steps is None:
        keep_last = 2  # those of the clock are for going on, not for keeping
    return Checkpointer(
        Path(wanted.checkpoint_dir),
        world,
        tokenizer,
        wanted.save_consolidated,
        Retention(keep_last, wanted.keep_best),
        {**fingerprint(cfg), "training data": _digest(samples)},
        cfg.text,
        stops_on_failed_save=wanted.on_failed_save == "stop",
        patience=seconds_after_sigterm(),
    )


def _model_files(cfg: RunConfig, world: World) -> dict[str, str]:
    """Of which files student and teacher are made; rank 0 looks."""
    used = [cfg.model, *([cfg.teacher_model] if cfg.teacher_model and cfg.kd_ratio > 0 else [])]

    def look() -> dict[str, str]:
        found = {part.key: identity_of(name_of(part), part.kwargs) for part in used}
        return {f"{key}{FILES}": text for key, text in found.items() if text is not None}

    return on_rank0(look, world)


def _digest(samples: Any) -> str:
    """How many samples there are and a hash of some of them, spread over all."""
    count = len(samples)
    tokens = [samples[k]["input_ids"] for k in range(0, count, max(1, count // _HASHED_SAMPLES))]
    return f"{count} samples, {hashlib.sha256(repr(tokens).encode()).hexdigest()[:12]}"


def refuse_changes(cfg: RunConfig, changes: dict[str, str]) -> None:
    """Refuse to offer the student of a finished run as that of another one.

    Args:
        changes: `Checkpointer.changes`; newer libraries and fewer steps do not count.

    Raises:
        ConfigError: with what has changed.
    """
    harmless = ("ds_kd", "torch", "transformers", "deepspeed", *_LENGTH)
    lines = [line for name, line in changes.items() if name not in harmless]
    if lines:
        raise ConfigError([problem(
            "checkpoint.checkpoint_dir", cfg.checkpoint.checkpoint_dir,
            f"the settings of the run that is finished there, but {', '.join(lines)}",
            "give another directory, or the old values; with a larger max_steps or num_epochs the "
            "finished run goes on",
        )])  # fmt: skip


def closing_message(cfg: RunConfig, step: int, finished: bool) -> str:
    """Where the result is and what to type next."""
    directory = Path(cfg.checkpoint.checkpoint_dir)
    if cfg.step_scheduler.max_steps == 0:
        return f"validated after step {step}; nothing was trained or saved"
    if not finished:
        onward = f"the same command goes on from {directory / LATEST}"
        kept = onward if cfg.checkpoint.enabled else "nothing is kept, as checkpoints are off"
        return f"preempted at step {step}; {kept}"
    if not cfg.checkpoint.enabled:
        return "done; nothing is kept, as checkpoints are off"
    if cfg.checkpoint.save_consolidated == "false" or not (directory / FINAL).exists():
        student = f"python launch/export.py {directory / LATEST} OUT writes it for transformers"
    else:
        student = f"student: {directory / FINAL} (AutoModelForCausalLM.from_pretrained loads it)"
    return f"checkpoint: {directory / LATEST}\n{student}"
