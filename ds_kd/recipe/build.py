"""Build a `Trainer` from a config. The components below take plain values and read no config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_kd.checkpoint.checkpointer import Checkpointer
from ds_kd.checkpoint.retention import Retention
from ds_kd.checkpoint.settings import Settings
from ds_kd.checkpoint.state import TrainState, seed_rank
from ds_kd.checkpoint.writer import Writer
from ds_kd.config.checks.zero_file import load_zero_config, offloads_optimizer
from ds_kd.config.components import ConfigError, config_error
from ds_kd.config.load import fingerprint, list_defaults, settings_of
from ds_kd.config.names import INT8
from ds_kd.config.schema import RunConfig
from ds_kd.evaluate.samples import Generations, Next, choose_questions
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.named.hidden_states import HiddenStates
from ds_kd.models import causal_lm, lora
from ds_kd.models.operations import Operations, count_operations
from ds_kd.parallel import engines
from ds_kd.parallel.rendezvous import seconds_after_sigterm
from ds_kd.parallel.sequence import Exchange
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.card import write_card
from ds_kd.recipe.changes import add_model_files, fingerprint_validations, hash_samples
from ds_kd.recipe.data import attends_by_sample, build_loader, build_samples
from ds_kd.recipe.lengths import check_lengths
from ds_kd.recipe.loss.build import build_layer_losses, build_loss
from ds_kd.recipe.models import (
    check_model,
    config_of,
    load_model,
    name_of,
    tokenizer_of,
)
from ds_kd.recipe.offline.rows import list_asked
from ds_kd.recipe.offline.teacher import build_cached
from ds_kd.recipe.optimizer import build_optimizer, build_schedule, place_optimizer
from ds_kd.recipe.resident.placement import make_teacher_zero
from ds_kd.recipe.rollouts import build_batches, steps_per_epoch
from ds_kd.recipe.tasks.in_run import build_evaluation
from ds_kd.recipe.tuning.compile import compile_model
from ds_kd.recipe.tuning.engine import count_micro_batches, make_engine_config
from ds_kd.recipe.tuning.gradients import choose_exchange
from ds_kd.recipe.tuning.kernels import replace_kernels
from ds_kd.recipe.tuning.window import build_window
from ds_kd.teachers.base import Teacher
from ds_kd.teachers.cached import FillingTeacher
from ds_kd.teachers.resident import ResidentTeacher
from ds_kd.teachers.shared_base import SharedBaseTeacher
from ds_kd.train.batches import Batches, NotedPasses
from ds_kd.train.metrics import Metrics
from ds_kd.train.rollouts import RolloutBatches
from ds_kd.train.schedule import Schedule
from ds_kd.train.trainer import Trainer
from ds_kd.train.validation import Validation

#: Kinds of teacher that are models on the ranks, and can answer questions.
_WITH_ENGINE = (ResidentTeacher, SharedBaseTeacher)


def build(
    cfg: RunConfig, world: World, asked_to_stop: Callable[[], bool] = lambda: False
) -> Trainer:
    """Build the trainer of a run from a checked config.

    Args:
        world: this process's place in the job.
        asked_to_stop: returns whether this rank was asked to stop after its step.

    Raises:
        ConfigError: something named in the config does not exist or does not fit; names the key.
    """
    seed_rank(cfg.rng.seed, world.tokens.rank, cfg.rng.ranked)
    tokenizer = tokenizer_of(cfg.model, world)
    samples, held_out = build_samples(cfg, tokenizer, world)
    loader, _ = build_loader(cfg, samples, cfg.dataloader, world, True)
    validation = _build_validation(cfg, held_out, world)
    schedule = _make_schedule(cfg, steps_per_epoch(cfg, loader))

    # Parts that may fail are built before the models, which take minutes to load.
    metrics = _open_metrics(cfg, schedule, world)
    checkpointer = _make_checkpointer(cfg, tokenizer, loader, validation, world)
    loss = build_loss(cfg, tokenizer, world)
    check_lengths(cfg, [loader, *validation.values()], loader)
    evaluation = build_evaluation(cfg, tokenizer, loss.vocab_size, world)
    teacher, student = _build_models(cfg, tokenizer, samples, held_out, loss, schedule, world)
    batches = build_batches(cfg, loader, tokenizer, student, teacher, loss, world)
    if checkpointer is not None:
        _complete(checkpointer, batches, teacher, cfg, world)
    generations = _make_generations(cfg, tokenizer, held_out, student, teacher, world)
    return Trainer(
        student=student,
        teacher=teacher if cfg.kd_ratio > 0 else None,
        batches=_settle_after_passes(batches, teacher),
        validation=Validation(validation, teacher, world, generations),
        schedule=schedule,
        metrics=metrics,
        checkpointer=checkpointer,
        state=TrainState(),
        world=world,
        validate_first=cfg.step_scheduler.val_at_start,
        asked_to_stop=asked_to_stop,
        max_skipped=cfg.step_scheduler.max_skipped_steps,
        save_every_seconds=60 * cfg.checkpoint.every_minutes or None,
        operations=_count_operations(cfg, student, teacher, world),
        evaluation=evaluation,
        reduce_once=choose_exchange(cfg, student, world),
    )


def _complete(
    checkpointer: Checkpointer,
    batches: Batches,
    teacher: Teacher | None,
    cfg: RunConfig,
    world: World,
) -> None:
    """Tell the checkpointer of the models' files, and have checkpoints hold the student's texts,
    and come after the rows of a filled cache (a collective)."""
    writer = checkpointer.writer
    add_model_files(checkpointer.settings, cfg, world)  # by now all of them are downloaded
    writer.buffer = batches if isinstance(batches, RolloutBatches) else None
    if isinstance(teacher, FillingTeacher):
        writer.write_first = teacher.close


def _settle_after_passes(batches: Batches, teacher: Teacher | None) -> Batches:
    """Return the batches, with a cache that is filled made known to all ranks after each pass."""
    if isinstance(teacher, FillingTeacher):
        return NotedPasses(batches, teacher.settle)
    return batches


def _build_validation(cfg: RunConfig, held_out: dict[str, Any], world: World) -> dict[str, Any]:
    """Return a loader for each validation set."""
    return {
        name: build_loader(cfg, part, cfg.validation_dataloader, world, False)[0]
        for name, part in held_out.items()
    }


def _build_models(
    cfg: RunConfig,
    tokenizer: Any,
    samples: Any,
    held_out: dict[str, Any],
    loss: DistillationLoss,
    schedule: Schedule,
    world: World,
) -> tuple[Teacher | None, Any]:
    """Return the teacher, if the run has one, and the student's engine.

    Args:
        tokenizer: the student's.
        samples, held_out: those about which the teacher is asked.
    """
    layer_losses = build_layer_losses(cfg)
    compared = [other for _, part in layer_losses for _, other in part.pairs]
    teacher: Teacher | None = None
    if cfg.reads_cache:
        load = functools.partial(build_teacher, cfg, [], world)
        asked = list_asked(cfg, samples, held_out)
        teacher = build_cached(cfg, tokenizer, asked, load, world)
    elif cfg.loads_teacher:
        teacher = build_teacher(cfg, compared, world)

    if cfg.kd_ratio == 0 or cfg.reads_cache:
        # A teacher that only validation uses must not change the random numbers of training, and
        # nor must one that is loaded only where a cache lacks rows.
        seed_rank(cfg.rng.seed, world.tokens.rank, cfg.rng.ranked)
    student = _build_student(cfg, loss, layer_losses, schedule, world)
    if cfg.asks_teacher and teacher is None:
        own = [number for _, part in layer_losses for number, _ in part.pairs]
        student.module.watch([*own, *compared])
        return SharedBaseTeacher(student), student
    return teacher, student


def _count_operations(
    cfg: RunConfig, student: Any, teacher: Teacher | None, world: World
) -> Operations | None:
    """Return the operations of a training step's models."""
    guide = teacher.engine.module.model if isinstance(teacher, _WITH_ENGINE) else None
    return count_operations(student.module.model, guide if cfg.kd_ratio else None, world.device)


def _make_generations(
    cfg: RunConfig,
    tokenizer: Any,
    held_out: dict[str, Any],
    student: Any,
    teacher: Teacher | None,
    world: World,
) -> Generations | None:
    """Return the questions of `val_samples`, of the first validation set, or None."""
    count = cfg.step_scheduler.val_samples
    if not (count and held_out):
        return None
    longest = getattr(config_of(cfg.model).get_text_config(), "max_position_embeddings", None)
    questions = choose_questions(next(iter(held_out.values())), tokenizer, count, longest)
    models: dict[str, Next] = {}
    if isinstance(teacher, _WITH_ENGINE):
        models["teacher"] = teacher.next_tokens
    models["student"] = functools.partial(student, probe="next_tokens")
    return Generations(models, tokenizer, questions, world) if questions else None


def _make_schedule(cfg: RunConfig, steps_per_epoch: int) -> Schedule:
    steps = cfg.step_scheduler
    return Schedule(
        steps_per_epoch,
        steps.num_epochs,
        steps.max_steps,
        steps.val_every_steps,
        steps.ckpt_every_steps,
        steps.patience,
    )


def build_teacher(cfg: RunConfig, compared: list[int], world: World) -> ResidentTeacher:
    """Return the teacher in an engine of its own.

    Args:
        compared: the layers whose outputs it gives too.
    """
    component = cfg.teacher_model
    assert component is not None
    zero = make_teacher_zero(cfg)
    config = make_engine_config(cfg, component, zero, world, None)
    by_sample = attends_by_sample(cfg, world)
    model = load_model(component, config, by_sample)
    replace_kernels(component, model, world)
    module = causal_lm.FrozenModel(model)
    module.exchange = Exchange(world.sequence)
    module.watch(compared)
    engine = engines.build_teacher(module, config)
    check_model(cfg, component, engine, world)
    compiles = not cfg.rolls_out and cfg.teacher.placement != INT8
    compile_model(cfg.compile, compiles, module.model, world)
    has_several = cfg.rolls_out or count_micro_batches(cfg, world) > 1
    wanted = cfg.teacher.window if has_several else 1
    return ResidentTeacher(engine, build_window(wanted, engine, zero, by_sample, world))


def _build_student(
    cfg: RunConfig,
    loss: DistillationLoss,
    layer_losses: list[tuple[float, HiddenStates]],
    schedule: Schedule,
    world: World,
) -> Any:
    zero = load_zero_config(cfg.deepspeed.student, "deepspeed.student")
    config = make_engine_config(cfg, cfg.model, zero, world, cfg.clip_grad_norm)
    model = load_model(cfg.model, config, attends_by_sample(cfg, world), adapter_of(cfg))
    replace_kernels(cfg.model, model, world)
    if cfg.distributed.activation_checkpointing:
        expected = "a model that can recompute its activations"
        with config_error("distributed.activation_checkpointing", True, expected):
            model.gradient_checkpointing_enable({"use_reentrant": False})

    # On a CPU the states of torch's optimizer are in the host's memory without offload.
    module = causal_lm.Student(model, loss, layer_losses)
    module.tensor = world.tensor
    module.exchange = Exchange(world.sequence)
    optimizer = cfg.optimizer
    if world.device.type != "cpu":
        optimizer = place_optimizer(optimizer, offloads_optimizer(zero))
    with config_error("optimizer", cfg.optimizer.name, "an element-wise optimizer"):
        engine = engines.build_student(
            module,
            config,
            lambda parameters: build_optimizer(optimizer, parameters, cfg.optimizer),
            build_schedule(cfg.lr_scheduler, max(1, schedule.total_steps)),
        )

    # Layers are compiled last, so that the check of the head sees them as they were defined.
    check_model(cfg, cfg.model, engine, world)
    compile_model(cfg.compile, not cfg.rolls_out, model, world)
    engine.train()
    return engine


def adapter_of(cfg: RunConfig) -> Callable[[Any], None] | None:
    """Return a function that adds the adapter of the `peft` section to a model, and the frozen one
    of `teacher.adapter` if there is one, or None."""
    wanted = cfg.peft
    if wanted is None:
        return None

    def adapt(model: Any) -> None:
        chosen = wanted.target_modules, wanted.exclude_modules
        given = {"target_modules": chosen[0], "exclude_modules": chosen[1]}
        with config_error("peft", given, f"names of linear maps of {name_of(cfg.model)}"):
            names = lora.find_linear_maps(model, *chosen, wanted.match_all_linear)

        # The adapter's own config names the directory or hub id of the base model.
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
        if (frozen := cfg.teacher.adapter) is not None:
            expected = f"a LoRA adapter of {name_of(cfg.model)}"
            with config_error("teacher.adapter", frozen, expected):
                lora.add_frozen_adapter(model, frozen)

    return adapt


def _open_metrics(cfg: RunConfig, schedule: Schedule, world: World) -> Metrics | None:
    """Return the metrics on rank 0, else None; an error on rank 0 is raised on all ranks."""
    made: list[Metrics] = []

    def make() -> None:
        made.append(
            Metrics(
                Path(cfg.tensorboard_dir),
                cfg.tensorboard.enabled,
                cfg.text,
                cfg.wandb,
                schedule.total_steps,
                settings=settings_of(cfg),
            )
        )

    # A ValueError of Weights & Biases already names its own section.
    def make_on_rank0() -> None:
        try:
            on_rank0(make, world)
        except ValueError as error:
            raise ConfigError([str(error)]) from error

    expected = "a directory that can be written"
    with config_error("tensorboard.log_dir", cfg.tensorboard_dir, expected):
        make_on_rank0()
    return made[0] if made else None


def _make_checkpointer(
    cfg: RunConfig, tokenizer: Any, loader: Any, validation: dict[str, Any], world: World
) -> Checkpointer | None:
    wanted = cfg.checkpoint
    if not wanted.enabled:
        return None
    held_out = {name: each.dataset.dataset for name, each in validation.items()}  # no filler
    settings = Settings(
        fingerprint(cfg) | hash_samples("training", loader.dataset.dataset),
        fingerprint_validations(cfg, held_out),
        list_defaults(cfg),
    )
    return Checkpointer(
        Path(wanted.checkpoint_dir),
        Writer(world, tokenizer, cfg.text, functools.partial(write_card, cfg, world.size)),
        wanted.save_consolidated,
        Retention(cfg.keep_last, wanted.keep_best),
        settings,
        stops_on_failed_save=wanted.on_failed_save == "stop",
        patience=seconds_after_sigterm(),
    )
