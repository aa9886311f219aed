"""A YAML to start from: batch size, dtype and offload as the memory plan allows."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from ds_kd.config.checks.files import DATA, columns_of
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import load
from ds_kd.data.source import CHAT, HELLASWAG, SQUAD
from ds_kd.plan import memory
from ds_kd.plan.dry_run import data_of, model_shape, work_of

_BATCHES = (16, 8, 4, 2, 1)
_GLOBAL = 32
_TEMPLATE = """\
# {student} under {teacher}, for {gpus} rank(s) of {room:.0f} GiB each.
# Every key: python launch/kd.py --list-keys      What it needs: … --dry-run --ranks {gpus}
model:                          # the student, all of whose weights are trained
  pretrained_model_name_or_path: {student}
  torch_dtype: bf16
teacher_model:                  # frozen
  pretrained_model_name_or_path: {teacher}
  torch_dtype: bf16
offload_teacher_model: {offload_teacher}   # its shards in the host's memory
kd_ratio: 0.5                   # 0: the labels alone, 1: the teacher alone
kd_loss_fn:
  temperature: 1.0
optimizer:
  _target_: torch.optim.AdamW
  lr: 1.0e-5
lr_scheduler:
  name: cosine
  warmup_ratio: 0.03
clip_grad_norm: 1.0
dataset:
  _target_: {target}
  {argument}: {data}
dataloader:
  shuffle: true
step_scheduler:
  global_batch_size: {batch}         # samples per optimizer step, over all ranks
  local_batch_size: {local}           # of one forward on one rank: what fits, of 1 to 16
  num_epochs: 1
  ckpt_every_steps: 200
distributed:
  activation_checkpointing: {checkpointing}
deepspeed:
  student: {zero}
checkpoint:
  checkpoint_dir: checkpoints/
  keep_last: 2
"""
_OFFLOAD = "{zero_optimization: {stage: 3, offload_optimizer: {device: cpu, pin_memory: true}}}"


def starter(student: str, teacher: str, data: str, gpus: int, room: int) -> str:
    """A commented YAML.

    Args:
        student, teacher: directories or hub ids.
        data: a hub id or local file; its first row tells which data set reads it.
        gpus: ranks.
        room: bytes of each.

    Raises:
        ConfigError: something named does not exist, or nothing fits.
    """
    for option, name in (("--student", student), ("--teacher", teacher), ("--data", data)):
        if "${" in name:
            raise ConfigError([problem(option, name, "a name without ${, which a YAML replaces")])
    target = _target_of(data)
    values = {
        "student": _yaml(student), "teacher": _yaml(teacher), "data": _yaml(data), "gpus": gpus,
        "room": room / 2**30,
        "target": target, "argument": DATA[target][0], "local": 1, "batch": gpus,
        "offload_teacher": "false", "checkpointing": "false", "zero": "null",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new.yaml"
        path.write_text(_TEMPLATE.format(**values))
        try:
            cfg = load(path)
        except ConfigError as error:  # the file is nobody's
            lines = [line.split("\n")[0].rpartition(f"{path}:")[2] for line in error.problems]
            raise ConfigError([re.sub(r"^\d+:\d+: ", "", line) for line in lines]) from None
    assert cfg.teacher_model is not None
    shapes = model_shape(cfg.model), model_shape(cfg.teacher_model)
    _, tokens, supervised, _ = data_of(cfg)
    plain = work_of(cfg, gpus, tokens, supervised)
    moves = [plain, replace(plain, checkpointing=True)]
    moves.append(replace(moves[-1], offload_teacher=True))
    moves.append(replace(moves[-1], offload_optimizer=True))
    for work in moves:
        for local in _BATCHES:
            wanted = replace(work, tokens=tokens * local)
            if memory.on_device(memory.memory(*shapes, wanted, gpus)) <= 0.9 * room:
                width = local * gpus
                values |= {"local": local, "batch": -(-_GLOBAL // width) * width}
                values["checkpointing"] = str(work.checkpointing).lower()
                values["offload_teacher"] = str(work.offload_teacher).lower()
                values["zero"] = _OFFLOAD if work.offload_optimizer else "null"
                return _TEMPLATE.format(**values)
    least = memory.on_device(memory.memory(*shapes, moves[-1], gpus)) / 2**30
    raise ConfigError(
        [f"--gpus {gpus}: {least:.1f} GiB are needed on each and there are {room / 2**30:.1f}; "
         f"give more of them, or smaller models"]
    )  # fmt: skip


def _yaml(name: str) -> str:
    """A name as YAML reads it back."""
    return name if re.fullmatch(r"[A-Za-z_.]*/[A-Za-z_][\w./-]*", name) else json.dumps(name)


def _target_of(data: str) -> str:
    """The data set that reads these rows, by their columns; SQuAD's for a hub id."""
    path = Path(data)
    if not path.is_file():
        return "ds_kd.data.squad.make_squad_dataset"
    try:
        found = columns_of(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            [problem("--data", data, "rows of JSON or parquet", str(error))]
        ) from None
    for target, (_, columns, _) in DATA.items():
        if set(columns) <= set(found):
            return target
    known = " or ".join(", ".join(columns) for columns in (SQUAD, HELLASWAG, CHAT))
    raise ConfigError([problem("--data", data, known, f"its first row has {', '.join(found)}")])
