"""Write, read and reshard DeepSpeed's own files in a checkpoint.

If a disk is full, no rank waits in vain for another; reading runs no code of the files.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_kd.checkpoint.engine.cut import count_parts, write_universal
from ds_kd.checkpoint.engine.optimizer_settings import apply_settings, read_settings, states_of
from ds_kd.checkpoint.manifest import CheckpointError
from ds_kd.parallel.engines import optimizer_numbers


class _RecordingWriter:
    """DeepSpeed's writer, which records an error instead of raising it.

    Saving an engine calls many collectives. A rank that left it with an error would leave the
    others waiting.
    """

    def __init__(self, writer: Any):
        self._writer = writer
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            self._writer.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
            self.error = error


def save_engine(engine: Any, directory: Path, tag: str) -> Exception | None:
    """Write the engine's weights, optimizer and schedule into `directory/tag` (a collective).
    Frozen weights are not written.

    Returns:
        The error of this rank, or None.
    """
    _pickle_stage_by_value()
    plain = engine.checkpoint_engine
    engine.checkpoint_engine = recording = _RecordingWriter(plain)
    try:
        engine.save_checkpoint(
            str(directory), tag=tag, save_latest=False, exclude_frozen_parameters=_is_frozen(engine)
        )
    finally:
        engine.checkpoint_engine = plain
    return recording.error


def load_engine(engine: Any, directory: Path, tag: str) -> bool:
    """Load the files of `save_engine` on the same number of ranks, and return whether there are
    any.

    Weights and optimizer states are loaded. The settings of the optimizer and its schedule stay
    those of this run, at the checkpoint's step.

    Raises:
        CheckpointError: the states belong to another optimizer.
        RuntimeError: the files belong to another model.
    """
    optimizer = engine.optimizer.optimizer
    settings = read_settings(optimizer)

    # The settings are read before DeepSpeed overwrites them with those of the checkpoint.
    try:
        with trust_pickles():
            loaded, _ = engine.load_checkpoint(
                str(directory),
                tag=tag,
                load_module_strict=not _is_frozen(engine),
                load_lr_scheduler_states=False,
            )
    except KeyError as error:  # torch's optimizers raise it for a missing state
        raise _of_another(optimizer, directory, str(error.args[0])) from error
    if loaded is None:
        return False

    for state in optimizer.state.values():
        if state and (missing := states_of(optimizer) - state.keys()):
            raise _of_another(optimizer, directory, ", ".join(sorted(missing)))
    complete_states(optimizer)
    steps = engine.global_steps - engine.skipped_steps
    apply_settings(optimizer, settings, engine.lr_scheduler, steps)
    return True


def _of_another(optimizer: torch.optim.Optimizer, directory: Path, missing: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} holds the state of another optimizer, without the {missing} of "
        f"{type(optimizer).__name__}; write the optimizer section as it was, or give "
        f"checkpoint.checkpoint_dir another directory"
    )


def complete_states(optimizer: torch.optim.Optimizer) -> None:
    """Complete loaded states that another class of Adam saved, as after offload was switched on or
    off.

    torch replaces whole parameter groups, and DeepSpeed's optimizers count steps in a plain number,
    torch's in a tensor.
    """
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
    is_of_deepspeed = type(optimizer).__module__.startswith("deepspeed.")
    on_device = any(map(optimizer.defaults.get, ("fused", "capturable")))
    for parameter, state in optimizer.state.items():
        if "step" not in state:
            continue
        if is_of_deepspeed:
            state["step"] = int(state["step"])
        else:
            # After a universal checkpoint all parts share one counter, which each would advance.
            device = parameter.device if on_device else "cpu"
            state["step"] = torch.tensor(float(state["step"]), device=device)


def find_lost_states(engine: Any) -> list[str]:
    """Return the names of the optimizer's states that `reshard` would lose."""
    return sorted(states_of(engine.optimizer.optimizer) - {"exp_avg", "exp_avg_sq"})


def reshard(directory: Path, tag: str, out: Path, for_cut: bool) -> None:
    """Write `directory/tag` as DeepSpeed's universal checkpoint, which any number of ranks can
    read. Call it on one rank.

    Args:
        for_cut: whether the engine that will read it cuts its matrices.
    """
    from deepspeed.checkpoint import ds_to_universal

    _pickle_stage_by_value()
    if for_cut or count_parts(directory / tag) > 1:
        with trust_pickles():
            write_universal(directory / tag, out / tag)
        return

    # DeepSpeed's script prints progress bars; its errors are exceptions.
    silence = io.StringIO()
    with (
        trust_pickles(),
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        ds_to_universal.main(
            Namespace(
                input_folder=str(directory / tag),
                output_folder=str(out / tag),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


def load_resharded(engine: Any, out: Path, tag: str) -> bool:
    """Load the files of `reshard`, as `load_engine` does."""
    config = engine._config
    before = config.load_universal_checkpoint
    config.load_universal_checkpoint = True
    try:
        return load_engine(engine, out, tag)
    finally:
        config.load_universal_checkpoint = before


def _is_frozen(engine: Any) -> bool:
    """Return whether there are weights that training does not change."""
    return any(not p.requires_grad for p in engine.module.parameters())


def state_bytes(engine: Any) -> int:
    """Return the bytes that a ZeRO-3 engine keeps on this rank between steps: sharded and whole
    weights, fp32 weights, optimizer states and gradients."""
    parameters = [*engine.module.parameters()]
    tensors = [p.ds_tensor for p in parameters]
    tensors += [p.data for p in parameters if p.data.numel() == p.ds_numel]
    gradients = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    tensors += [] if gradients is None else [gradients]
    return _bytes_of([*tensors, *_find_trained_tensors(engine)])


def count_written_bytes(engine: Any) -> int:
    """Return the bytes that this rank writes into a checkpoint: fp32 weights and optimizer states,
    which before the first step are estimated."""
    trained = _find_trained_tensors(engine)
    optimizer = engine.optimizer.optimizer
    if optimizer.state:
        return _bytes_of(trained)
    numbers = optimizer_numbers(type(optimizer).__name__, optimizer.defaults)
    return _bytes_of(trained) * (1 + numbers)


def _find_trained_tensors(engine: Any) -> list[torch.Tensor]:
    tensors = [*(getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or ())]
    optimizer = getattr(engine.optimizer, "optimizer", None)
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _pickle_stage_by_value() -> None:
    """Make every Python pickle the one enum that DeepSpeed stores as `ZeroStageEnum(3)`.

    Early releases of Python 3.11, Debian 12's among them, write `getattr(ZeroStageEnum,
    "weights")`, and a safe reader must not allow `getattr`.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@contextlib.contextmanager
def trust_pickles() -> Iterator[None]:
    """Make DeepSpeed read its own files with `weights_only=True`, and allow the two classes in
    them.

    DeepSpeed calls `torch.load(weights_only=False)`; an environment variable of torch overrides it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
