"""Open a run: build its trainer from a config and resume from its newest checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ds_kd.checkpoint.retention import new_id
from ds_kd.checkpoint.run_lock import RunLock
from ds_kd.config.checks.machine import refuse_missing_packages
from ds_kd.config.components import config_error
from ds_kd.config.load import check_world
from ds_kd.config.schema import RunConfig
from ds_kd.parallel import world as distributed
from ds_kd.parallel.signals import StopRequest
from ds_kd.parallel.world import World, on_rank0
from ds_kd.process import check_caches
from ds_kd.recipe.build import build
from ds_kd.recipe.changes import refuse_changes
from ds_kd.recipe.results import marker_of
from ds_kd.teachers.cached import FillingTeacher
from ds_kd.train.trainer import Trainer


def open_run(
    cfg: RunConfig,
    listens: bool = False,
    settle: Callable[[RunConfig, World], RunConfig] = lambda cfg, _: cfg,
) -> Trainer:
    """Join the job, take the checkpoint directory, build and resume (a collective).

    Resources that the trainer holds until it is closed are released here if anything fails.

    Args:
        cfg: a checked config.
        listens: let signals end the run after its step.
        settle: decides what the config leaves to the memory that is there; a collective.

    Raises:
        UserError: something that the config names does not exist or fit, a finished run had other
            settings, or a rank is gone.
    """
    refuse_missing_packages(cfg)
    check_caches()
    sizes = cfg.distributed.tp_size or 1, cfg.distributed.cp_size or 1
    world = distributed.start(cfg.dist_env.backend, cfg.dist_env.timeout_minutes)
    check_world(cfg, world.size)
    world = distributed.divide(world, cfg.dist_env.timeout_minutes, *sizes)
    with ExitStack() as held:
        held.enter_context(distributed.name_lost_ranks(world))
        lock = held.enter_context(lock_directories(cfg, world))
        # After an error the job is not left together, as other ranks may not reach the barrier.
        held.push(lambda error, *_: None if error else distributed.stop())
        trainer = _build_trainer(settle(cfg, world), world, listens)
        _resume(cfg, trainer, lock)
        if isinstance(filling := trainer.validation.teacher, FillingTeacher):
            held.callback(filling.close)
        trainer.held = held.pop_all()
        return trainer
    raise AssertionError("none of the contexts above suppresses an error")


@contextmanager
def lock_directories(cfg: RunConfig, world: World) -> Iterator[RunLock | None]:
    """Lock the directories of checkpoints and log for this run, and yield the lock of the first, or
    None if checkpoints are off.

    The marker of a run that a signal stopped is removed, as it goes on: should it fail now, nobody
    takes that for another stop.

    Raises:
        ConfigError: another run uses one of them, or it cannot be written.
    """
    names = {"tensorboard.log_dir": cfg.tensorboard_dir}
    if cfg.checkpoint.enabled:
        names = {"checkpoint.checkpoint_dir": cfg.checkpoint.checkpoint_dir, **names}
    locks = [RunLock(Path(name)) for name in names.values()]

    # Only rank 0 takes them, as all ranks must get one answer even if their disks differ.
    def take() -> None:
        taken: set[Path] = set()  # both names may mean one directory
        for lock, (key, name) in zip(locks, names.items(), strict=True):
            directory = Path(name)
            with config_error(key, name, "a directory to write in that no other run uses"):
                directory.mkdir(parents=True, exist_ok=True)
                if directory.resolve() not in taken:
                    lock.take()
            taken.add(directory.resolve())
        if cfg.step_scheduler.max_steps != 0:  # such a run only looks at what is there
            marker_of(cfg).unlink(missing_ok=True)

    with ExitStack() as held:
        for lock in locks:
            held.callback(lock.release)
        on_rank0(take, world)
        yield locks[0] if cfg.checkpoint.enabled else None


def _build_trainer(cfg: RunConfig, world: World, listens: bool) -> Trainer:
    for note in cfg.notes:
        _say(world, note)
    if world.backend != cfg.dist_env.backend:
        _say(
            world,
            f"dist_env.backend: {cfg.dist_env.backend} needs CUDA, which this machine lacks; "
            f"using {world.backend}",
        )
    started, stop = time.monotonic(), StopRequest()
    if listens:
        stop.listen()
    trainer = build(cfg, world, stop)
    if trainer.metrics is not None and trainer.checkpointer is not None:
        trainer.checkpointer.say = trainer.metrics.say  # which knows of the progress bar

    # Only the data tell how many steps an epoch has.
    if unreached := trainer.schedule.describe_unreached():
        _say(world, unreached)
    _say(
        world,
        f"{world.size} rank(s) on {world.device.type}{_describe_groups(world)}, "
        f"{trainer.schedule.total_steps} steps, "
        f"ready in {time.monotonic() - started:.0f} s",
    )
    return trainer


def _describe_groups(world: World) -> str:
    """Return words for the number of ranks that see a sample together, if it is not one."""
    together = world.size // world.data.size
    return f" ({together} see a sample together)" if together > 1 else ""


def _resume(cfg: RunConfig, trainer: Trainer, lock: RunLock | None) -> None:
    """Resume from the newest checkpoint, if there is one. If the run is finished, check that this
    config asks for the same student."""
    checkpointer, state = trainer.checkpointer, trainer.state
    if checkpointer is None:
        _begin_log(trainer, new_id(), None)
        return
    checkpointer.lock = lock

    # A run of no steps looks at the checkpoint of another length, and writes nothing beside it.
    only_validates = trainer.schedule.only_validates
    found = checkpointer.resume(trainer.student, state, puts_final=not only_validates)
    _begin_log(trainer, checkpointer.course.run, None if found is None else state.step)

    if found is not None:
        _say(trainer.world, f"resumed from {found} at step {state.step}")
        onward = trainer.schedule.describe_longer(state.step)
        if trainer.is_done:
            refuse_changes(cfg, checkpointer.changes.fingerprint, onward)
        if checkpointer.changes.validation and state.validated >= 0:
            _forget_validations(trainer, [*checkpointer.changes.validation])
        if trainer.is_done and not only_validates:
            checkpointer.export_final(trainer.student)
            _say(trainer.world, f"the run is done at step {state.step}; {onward} goes on")
    if not trainer.is_done:  # a finished run saves no checkpoint any more
        checkpointer.check_room(trainer.student)


def _begin_log(trainer: Trainer, run: int, resumed: int | None) -> None:
    if trainer.metrics is not None:  # on rank 0
        trainer.metrics.begin(run, resumed, trainer.schedule.only_validates)


def _forget_validations(trainer: Trainer, changed: list[str]) -> None:
    trainer.state.forget_validations()
    _say(
        trainer.world,
        f"validation measures something else than before ({', '.join(changed)}): its losses are "
        f"not compared with earlier ones, and patience counts anew",
    )


def _say(world: World, text: Any) -> None:
    if world.is_main:
        print(text, flush=True)
