"""The student as a Hugging Face model, out of a running engine or out of a checkpoint."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch

from ds_kd import zero_files
from ds_kd.distributed import World, on_rank0
from ds_kd.manifest import ENGINE, MANIFEST, MODEL, CheckpointError, error_of, verify
from ds_kd.models import gathered
from ds_kd.shards import ShardWriter

_PREFIX = "model."  # models.Student holds the HF model as `.model`


def export_student(engine: Any, directory: Path, world: World) -> None:
    """Write the engine's student as Hugging Face safetensors, parameter by parameter (a
    collective).

    Rank 0 holds one shard above its training memory. Tied weights are written once; transformers
    ties them on loading.

    Raises:
        OSError, SafetensorError: on every rank, where rank 0 cannot write.
    """
    model = engine.module.model
    writer = ShardWriter(directory) if world.is_main else None
    kept = model.state_dict().keys()  # leaves out buffers that are rebuilt on loading
    error = None
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            # After an error too, every rank gathers to the end.
            if writer is not None and error is None:
                copied = parameter.detach().to("cpu", copy=True)
                error = error_of(functools.partial(writer.add, name, copied))

    def finish() -> None:
        if error is not None:
            raise error
        assert writer is not None
        for name, buffer in model.named_buffers():
            if name in kept:
                writer.add(name, buffer.detach().to("cpu", copy=True))
        writer.close()

    on_rank0(finish, world)


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write a saved checkpoint's student as a Hugging Face model, without a job or a GPU.

    The weights are DeepSpeed's fp32 master copies in the model's own dtype.

    Raises:
        CheckpointError: not a checkpoint of ds_kd, or damaged.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoConfig

    if not (checkpoint / MANIFEST).is_file():
        raise CheckpointError(
            f"{checkpoint}: no {MANIFEST} here; give a step_… directory or LATEST inside "
            f"checkpoint.checkpoint_dir"
        )
    verify(checkpoint)
    shutil.copytree(
        checkpoint / MODEL,
        out,
        dirs_exist_ok=True,
        ignore=lambda _, names: [n for n in names if "safetensors" in n],
    )
    dtype = AutoConfig.from_pretrained(out).dtype or torch.float32
    with zero_files.trusted_pickles():
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), ENGINE, lazy_mode=True)
    writer, seen = ShardWriter(out), set()
    for name, lazy in weights.items():
        if id(lazy) not in seen:  # a tied weight appears under both names as one object
            seen.add(id(lazy))
            tensor = lazy.contiguous() if not isinstance(lazy, torch.Tensor) else lazy
            writer.add(name.removeprefix(_PREFIX), tensor.to(dtype))
    writer.close()
