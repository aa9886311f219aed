"""Write a YAML to start from, with batch size and offload that fit the memory, and epochs and
validation that suit the number of rows."""

from __future__ import annotations

import inspect
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import load
from ds_kd.config.schema import RunConfig
from ds_kd.config.text.yaml_source import quote_yaml
from ds_kd.data.rows.declaration import DataSet
from ds_kd.data.rows.detect import columns_known, known_data_sets, recognise
from ds_kd.data.rows.files import columns_of, files_of
from ds_kd.data.rows.source import load_rows
from ds_kd.plan import memory
from ds_kd.plan.dry_run import model_shape, work_of
from ds_kd.plan.new_config.choice import Chooser, describe_choice
from ds_kd.plan.samples import data_of
from ds_kd.plan.step.cluster import Cluster

_GLOBAL = 32  # samples of a step, at least
_STEPS_OF_EPOCH = 20  # steps of an epoch, at least, if the number of ranks allows it
_FEW_STEPS = 100  # an epoch of fewer steps is repeated three times
_HELD_OUT = (0.05, 8, 512)  # share of the rows held out, and the least and greatest number
_VALIDATIONS = 10
_TEMPLATE = """\
# {student} under {teacher}, for {gpus} rank(s) of {room:.0f} GiB each.
# Every key: python launch/kd.py --list-keys      What it needs: … --dry-run --ranks {gpus}
{why}model:                          # the student, all of whose weights are trained
  pretrained_model_name_or_path: {student}
  torch_dtype: bf16
teacher_model:                  # frozen
  pretrained_model_name_or_path: {teacher}
  torch_dtype: bf16
{place}kd_ratio: 0.5                   # 0: the labels alone, 1: the teacher alone
kd_loss_fn:
  temperature: 1.0
optimizer:
  _target_: torch.optim.AdamW
  lr: 1.0e-5
lr_scheduler:
  name: cosine
  warmup_ratio: 0.03
clip_grad_norm: 1.0
dataset:{rows}
  _target_: {target}
  dataset_name: {data}
{reading}{validation}dataloader:
  shuffle: true
step_scheduler:
  global_batch_size: {batch}         # samples per optimizer step, over all ranks
  local_batch_size: {local}           # of one forward on one rank: what fits, of 1 to 16
  num_epochs: {epochs}{steps}
  val_every_steps: {val_every}
  val_at_start: true            # launch/compare.py shows before and after
  ckpt_every_steps: 200
distributed:
  activation_checkpointing: {checkpointing}
  tp_size: {cut}                    # ranks that share each layer
  cp_size: {split}                    # ranks that share each sample
deepspeed:
  student: {zero}
  teacher: {teacher_zero}
checkpoint:
  checkpoint_dir: checkpoints/
  keep_last: 2
"""
_NO_COPY = "{zero_optimization: {stage: 3, zero_hpz_partition_size: 1}}"
_HOST = "{device: cpu, pin_memory: true}"


@dataclass(frozen=True)
class Rows:
    """The rows that a user names, and how they are read.

    Args:
        data: a hub id or local file; its first row tells which data set reads it.
        validation: the rows to validate with; None holds out a share of the data's rows.
        columns: names of the question's and the answer's column, perhaps with a context's in front.
        chat_template: a Jinja file for rows that are conversations.
    """

    data: str
    validation: str | None = None
    columns: str | None = None
    chat_template: str | None = None


def write_starter(
    models: tuple[str, str], given: Rows, machine: memory.Machine, cluster: Cluster
) -> tuple[str, list[str]]:
    """Return a commented YAML, and warnings.

    Args:
        models: student and teacher, directories or hub ids.
        given: the rows to train on and to validate with.
        machine: the memory of a rank and its node.
        cluster: the ranks, and the GPUs for which the times of layouts are compared.

    Raises:
        ConfigError: a model or file does not exist, or no batch size fits.
    """
    assert machine.room is not None
    gpus = cluster.world
    _refuse_references(models, given)

    # The template is filled with the smallest batch first, so that its config can be planned.
    found = _recognise_data("--data", given.data, given)
    validation = _write_held_out(_HELD_OUT[0])
    if given.validation is not None:
        validation = _write_validation(given.validation, given)
    values: dict[str, Any] = {
        "student": _quote(models[0]), "teacher": _quote(models[1]), "data": _quote(given.data),
        "gpus": gpus, "room": machine.room / 2**30, "target": found.name,
        "local": 1, "batch": gpus, "checkpointing": "false", "why": "", "split": 1, "cut": 1,
        "place": "", "zero": "null", "teacher_zero": "null",
        "rows": "", "steps": "", "epochs": 1, "val_every": 1,
        "reading": _write_reading(found, given), "validation": validation,
    }  # fmt: skip
    with _name_option_of_template(models[0]):
        cfg = _load(values)
        rows, tokens, supervised, _ = data_of(cfg)

    if rows is not None and rows < 2:
        raise ConfigError([problem("--data", given.data, "at least 2 rows", f"it has {rows}")])
    if given.validation is None and rows is not None:
        share, fewest, most = _HELD_OUT
        held_out = min(max(round(share * rows), fewest), most, rows // 2)
        values["validation"] = _write_held_out(float(f"{held_out / rows:.3g}"))
        values["rows"] = f"                        # {rows:,} rows"
        rows -= held_out
    with_rows = None if rows is None else max(gpus, rows // _STEPS_OF_EPOCH)
    plain = work_of(cfg, gpus, tokens, supervised)
    values |= write_layout(make_chooser(cfg, plain, machine, cluster, with_rows))
    warnings = _plan_steps(values, rows)
    if rows is None:
        warnings.append(_describe_unread(given.data, found))
    return _TEMPLATE.format(**values), warnings


def _refuse_references(models: tuple[str, str], given: Rows) -> None:
    named = {"--student": models[0], "--teacher": models[1]}
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(given).items()}
    for option, name in (named | options).items():
        if name is not None and (not name or "${" in name):
            expected = "a name, without ${, which a YAML replaces"
            raise ConfigError([problem(option, name, expected)])


@contextmanager
def _name_option_of_template(student: str) -> Iterator[None]:
    """Make an error about a missing chat template name the option that gives one."""
    try:
        yield
    except ConfigError as error:
        if "has no chat template" not in str(error):
            raise
        expected = "a model with a chat template, as the rows are conversations"
        hint = "name an instruct model, or a template: --chat-template chat_template.jinja"
        raise ConfigError([problem("--student", student, expected, hint)]) from None


def _load(values: dict[str, Any]) -> RunConfig:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new.yaml"
        path.write_text(_TEMPLATE.format(**values), "utf-8")
        try:
            return load(path)
        except ConfigError as error:  # the user does not know this file, so places in it are cut
            lines = [line.split("\n")[0].rpartition(f"{path}:")[2] for line in error.problems]
            raise ConfigError([re.sub(r"^\d+:\d+: ", "", line) for line in lines]) from None


def make_chooser(
    cfg: RunConfig,
    plain: memory.Work,
    machine: memory.Machine,
    cluster: Cluster,
    widest: int | None,
    wanted: int = _GLOBAL,
) -> Chooser:
    """Return what chooses the layout of a run.

    Args:
        plain: a step of micro-batches of one sample.
        widest: samples of a step at most: with few rows, a large batch would leave hardly any step.
        wanted: samples of a step at least, as far as `widest` allows.
    """
    assert cfg.teacher_model is not None
    student, teacher = model_shape(cfg.model), model_shape(cfg.teacher_model)
    return Chooser(cfg, student, teacher, plain, machine, cluster, wanted, widest)


def write_layout(chooser: Chooser) -> dict[str, Any]:
    """Return the values of the YAML that say which layout a run has, and why.

    Raises:
        ConfigError: none fits.
    """
    found = chooser.choose()
    if found is None:
        raise ConfigError([_describe_lack(chooser)])
    work, place = found.layout.work, found.layout.placement
    parts = [("offload_optimizer", work.offload_optimizer), ("offload_param", work.offload_weights)]
    moved = "".join(f", {name}: {_HOST}" for name, is_moved in parts if is_moved)
    return {
        "local": found.layout.local,
        "batch": chooser.batch(found.layout),
        "checkpointing": str(work.checkpointing).lower(),
        "split": work.sequence,
        "cut": work.tensor,
        "place": f"teacher: {{placement: {place}}}\n" if found.layout.copies else "",
        "teacher_zero": "null" if found.layout.copies else _NO_COPY,
        "zero": f"{{zero_optimization: {{stage: 3{moved}}}}}" if moved else "null",
        "why": "".join(f"# {line}\n" for line in describe_choice(chooser, found)),
    }


def _describe_lack(chooser: Chooser) -> str:
    """Return a sentence on what even the smallest layout would need."""
    layout, machine = chooser.least(), chooser.machine
    parts, gpus = chooser.parts(layout), chooser.cluster.world
    if chooser.lacks(layout) == ["host"]:
        needed = f"{machine.of_node(parts, gpus) / 2**30:.1f} GiB of host memory are needed"
        there = f"--host-memory says {(machine.host_room or 0) / 2**30:.1f}"
    else:
        needed = f"{memory.on_device(parts) / 2**30:.1f} GiB are needed on each"
        there = f"there are {(machine.room or 0) / 2**30:.1f}"
    return f"--gpus {gpus}: {needed} and {there}; give more of them, or smaller models"


def _describe_unread(data: str, found: DataSet) -> str:
    return (
        f"warning: --data {data}: its split train cannot be loaded here: number and length of its "
        f"rows are guesses, and {found.name} is to read them; --columns QUESTION,ANSWER names the "
        f"columns of others, and dataset._target_ another data set"
    )


def _plan_steps(values: dict[str, Any], rows: int | None) -> list[str]:
    """Set the epochs and validations in `values`, and return a warning if there are few steps."""
    if rows is None:
        values["val_every"] = _FEW_STEPS
        return []
    of_epoch = -(-rows // values["batch"])
    values["epochs"] = 1 if of_epoch >= _FEW_STEPS else 3
    steps = of_epoch * values["epochs"]
    values["steps"] = f"                 # {steps:,} optimizer steps"
    values["val_every"] = max(1, steps // _VALIDATIONS)
    if steps >= _FEW_STEPS:
        return []
    return [
        f"warning: {rows:,} rows for training make {steps} optimizer steps of {values['batch']} "
        f"samples in {values['epochs']} epoch(s); more rows, more num_epochs or fewer ranks give "
        f"more steps"
    ]


def _write_held_out(share: float) -> str:
    return f"validation_share: {share:g}          # of the rows; they are not trained on\n"


def _write_validation(data: str, given: Rows) -> str:
    """Return the YAML's lines about a data set to validate with."""
    found = _recognise_data("--validation", data, given)
    lines = ["validation_dataset:", f"  _target_: {found.name}", f"  dataset_name: {_quote(data)}"]
    if not files_of(data):
        lines.append("  split: validation")
    return "\n".join([*lines, _write_reading(found, given)])


def _write_reading(data: DataSet, given: Rows) -> str:
    """Return the YAML's lines that say how a data set reads its rows."""
    lines = []
    if given.columns is not None:
        names = [name.strip() for name in given.columns.split(",")]
        if len(names) not in (2, 3) or not all(names):
            expected = "QUESTION,ANSWER or CONTEXT,QUESTION,ANSWER: names of columns"
            raise ConfigError([problem("--columns", given.columns, expected)])
        parts = ("context", "question", "answer")[-len(names) :]
        pairs = ", ".join(f"{part}: {quote_yaml(n)}" for part, n in zip(parts, names, strict=True))
        lines.append(f"  column_mapping: {{{pairs}}}\n")

    # Only rows that are conversations are rendered.
    if given.chat_template is not None:
        if "chat_template" not in inspect.signature(data.build).parameters:
            raise ConfigError([f"--chat-template: {data.name} renders no conversations; remove it"])
        lines.append(f"  chat_template: {_quote(given.chat_template)}\n")
    return "".join(lines)


def _quote(name: str) -> str:
    """Return a name in quotes, unless YAML reads it back without them."""
    return name if re.fullmatch(r"[A-Za-z_.]*/[A-Za-z_][\w./-]*", name) else quote_yaml(name)


def _find_data_set(function: str) -> DataSet:
    """Return the data set of this package whose function has this name."""
    return next(each for each in known_data_sets() if each.name.endswith(f".{function}"))


def _recognise_data(option: str, data: str, given: Rows) -> DataSet:
    """Return the data set that reads rows with these columns; that of SQuAD for a hub id whose rows
    cannot be loaded here."""
    if given.columns is not None:
        return _find_data_set("make_instruction_dataset")
    try:
        files = files_of(data)
        if files is not None:
            columns = columns_of(files[0])
        elif Path(data).is_dir():
            columns = load_rows(data, "train", ()).column_names
        elif (known := _columns_on_hub(data)) is not None:
            columns = known
        else:
            return _find_data_set("make_squad_dataset")
    except (OSError, ValueError, RecursionError) as error:
        expected = "rows of JSON, CSV or parquet"
        raise ConfigError([problem(option, data, expected, str(error))]) from None

    # The user may name the columns, if no data set reads those that the rows have.
    found = recognise(columns)
    if found is None:
        pair = shlex.quote(",".join(columns)) if len(columns) == 2 else "QUESTION,ANSWER"
        hint = f"its first row has {', '.join(columns)}; name two of them with --columns {pair}"
        raise ConfigError([problem(option, data, columns_known(), hint)])
    return found


def _columns_on_hub(data: str) -> list[str] | None:
    try:
        return list(load_rows(data, "train", ()).column_names)
    except ValueError:
        return None
