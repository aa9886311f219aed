"""Export the student as a Hugging Face model, from a running engine or from a checkpoint."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ds_kd.checkpoint.engine import files as engine_files
from ds_kd.checkpoint.engine.cut import CutFiles, count_parts
from ds_kd.checkpoint.manifest import (
    ADAPTER,
    ENGINE,
    MANIFEST,
    MODEL,
    CheckpointError,
    error_of,
    verify,
)
from ds_kd.checkpoint.shards import ShardWriter
from ds_kd.errors import UserError, first_line
from ds_kd.files import give_usual_mode
from ds_kd.models import lora
from ds_kd.models.files.file_names import FileNames, write_config
from ds_kd.models.files.weight_files import empty_model
from ds_kd.parallel.engines import gather
from ds_kd.parallel.world import World, on_rank0

_PREFIX = "model."  # models.Student holds the HF model as `.model`


def export_student(engine: Any, directory: Path, world: World) -> None:
    """Write the engine's student as Hugging Face safetensors, one parameter at a time (a
    collective).

    Weights get the names of the original files. Rank 0 needs memory for one shard and one layer in
    addition to training. Tied weights are written once, as transformers ties them on loading.
    Adapters are merged.

    Raises:
        OSError, SafetensorError: rank 0 cannot write; raised on every rank.
    """
    model = engine.module.model
    writer = ShardWriter(directory) if world.is_main else None
    names = FileNames(model, writer.add) if writer is not None else None
    kept = model.state_dict().keys()  # leaves out buffers that are rebuilt on loading
    error = None
    for name, parameters, value in lora.plain_weights(model):
        with gather(parameters):
            # After an error every rank still takes part in the remaining collectives.
            if names is not None and error is None:
                copied = value().to("cpu", copy=True)
                error = error_of(functools.partial(names.add, name, copied))

    def finish() -> None:
        if error is not None:
            raise error
        assert writer is not None and names is not None
        for name, buffer in model.named_buffers():
            if name in kept:  # adapters have none
                names.add(name, buffer.detach().to("cpu", copy=True))
        names.flush()
        writer.close()

    on_rank0(finish, world)


def export_adapter(engine: Any, directory: Path, world: World) -> None:
    """Write the engine's adapter in peft's format (a collective); rank 0 holds it whole.

    Raises:
        OSError, SafetensorError: rank 0 cannot write; raised on every rank.
    """
    model = engine.module.model
    parameters = lora.adapter_parameters(model)
    with gather([*parameters.values()]):
        whole = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    on_rank0(lambda: lora.save_adapter(model, whole, directory), world)


class ExportError(UserError):
    """A checkpoint cannot be exported, or the output cannot be written; the message says why."""

    exit_code = 2


def export_to(checkpoint: Path, out: Path) -> None:
    """Write a saved checkpoint's student at `out`, which appears whole or not at all.

    Raises:
        ExportError: the checkpoint is not whole, or `out` exists or cannot be written.
    """
    if os.path.lexists(out):
        raise ExportError(f"{out} exists; remove it or give another name")
    aside = out.with_name(f".{out.name}.part")  # without the dot it may be the user's
    try:
        shutil.rmtree(aside, ignore_errors=True)
        export_checkpoint(Path(os.path.realpath(checkpoint)), aside)
        aside.rename(out)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write a saved checkpoint's student as a Hugging Face model, without ranks or a GPU.

    The weights are DeepSpeed's fp32 copies in the dtype of the model. From a checkpoint with an
    adapter the merged model is written, and the adapter into `out/adapter`.

    Raises:
        CheckpointError: it is no whole checkpoint of ds_kd, or the model of its adapter is missing.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise CheckpointError(
            f"{checkpoint}: no {MANIFEST} here; give a step_… directory or LATEST inside "
            f"checkpoint.checkpoint_dir"
        )
    verify(checkpoint)
    if (checkpoint / ADAPTER).is_dir():
        _export_merged(checkpoint, out)
    else:
        _export_whole(checkpoint, out)


def _export_merged(checkpoint: Path, out: Path) -> None:
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = AutoConfig.from_pretrained(checkpoint / MODEL).dtype or torch.float32
    config = PeftConfig.from_pretrained(str(checkpoint / ADAPTER))
    base = config.base_model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(base, revision=config.revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / ADAPTER}: the model it adapts, {base}, cannot be loaded "
            f"({first_line(error)}); put it there, or write its path into adapter_config.json"
        ) from error
    merged: Any = PeftModel.from_pretrained(model, str(checkpoint / ADAPTER)).merge_and_unload()
    shutil.copytree(checkpoint / MODEL, out, ignore=shutil.ignore_patterns("*safetensors*"))
    merged.save_pretrained(out)
    give_usual_mode(out)
    write_config(merged.config, out)
    shutil.copytree(checkpoint / ADAPTER, out / ADAPTER)


def _export_whole(checkpoint: Path, out: Path) -> None:
    from transformers import AutoConfig

    shutil.copytree(
        checkpoint / MODEL,
        out,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*safetensors*"),
    )
    config = AutoConfig.from_pretrained(out)
    dtype = config.dtype or torch.float32
    with engine_files.trust_pickles():
        weights = _open_weights(checkpoint)

    # One tensor at a time, so that a large model needs no more memory than one shard.
    writer = ShardWriter(out)
    names = FileNames(empty_model(config), writer.add)
    for name, read in weights:
        if name.startswith(_PREFIX):  # a loss's weights stay here
            names.add(name.removeprefix(_PREFIX), read().to(dtype))
    names.flush()
    writer.close()


def _open_weights(checkpoint: Path) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    """Return (name, function that reads it whole, in fp32) of every weight; tied ones once."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if count_parts(checkpoint / ENGINE) > 1:
        files = CutFiles(checkpoint / ENGINE)
        weights = [(name, functools.partial(files.read, name, "fp32")) for name in files.names]
        return [*weights, *((name, kept.contiguous) for name, kept in files.buffers.items())]
    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), ENGINE, lazy_mode=True)

    # A tied weight appears under both names as one object.
    once = {id(lazy): (name, lazy) for name, lazy in reversed(found.items())}
    return [(name, lazy.contiguous) for name, lazy in reversed(once.values())]
