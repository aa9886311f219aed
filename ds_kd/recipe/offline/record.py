"""The record of a cache: whose outputs it holds, and in which numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.names import CACHE_RECORD, INT8, KEPT
from ds_kd.config.schema import RunConfig
from ds_kd.losses.head import Head
from ds_kd.models.causal_lm import DTYPES
from ds_kd.models.files.model_files import identity_of
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.models import config_of, name_of, tokenizer_of, training_dtype
from ds_kd.writing import write_text

_FORMAT = 1
HIDDEN, TOP_K, SAMPLED = KEPT  # values of teacher.keep
STORED = {**DTYPES, "fp16": torch.float16, "float16": torch.float16}


@dataclass(frozen=True)
class Record:
    """The teacher of a cache.

    Args:
        teacher: its directory or hub id when it was run.
        identity: of its files, or None if that is not known.
        dtype: of its weights when it was run.
        stored: dtype of the stored hidden states.
        hidden, rows: shape of its head, `[rows, hidden]`.
        scale, softcap: of its head; see `Head`.
        tokens: number of its tokenizer's tokens.
        largest: the largest id of a token.
        vocabulary: hash of the tokenizer's map from tokens to ids.
        template: hash of the chat template with which the samples were made.
        keep: what rows hold: `hidden`, `top_k` or `sampled`.
        k: ids or draws of a row; 0 of hidden states.
        temperature: at which the last two hold the distribution.
        shared: number of ids over which they hold it.
        weights: `int8` if the teacher's weights were rounded to 8 bits when it was run.
        format: of the files.
    """

    teacher: str
    identity: str | None
    dtype: str
    stored: str
    hidden: int
    rows: int
    scale: float
    softcap: float | None
    tokens: int
    largest: int
    vocabulary: str
    template: str
    keep: str = HIDDEN
    k: int = 0
    temperature: float = 1.0
    shared: int = 0
    weights: str = ""
    format: int = _FORMAT

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the fields of one row."""
        if self.keep == HIDDEN:
            return self.hidden * STORED[self.stored].itemsize
        return 4 * self.k if self.keep == SAMPLED else 8 * self.k + 4

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the teacher's head, which hidden states need beside them."""
        width = STORED[self.dtype].itemsize
        return self.rows * self.hidden * width if self.keep == HIDDEN else 0

    def describe(self) -> str:
        """Return what a row holds, in words."""
        if self.keep == HIDDEN:
            return f"{self.hidden} numbers in {self.stored}"
        of = "draws" if self.keep == SAMPLED else "likeliest ids and the rest"
        return f"{self.k} {of} at T = {self.temperature:g}"


def make_record(cfg: RunConfig, head: Head | None, student: Any, world: World) -> Record:
    """Return the record of the cache that a config asks for.

    Args:
        head: the teacher's, whole or not; None where it is not loaded.
        student: the student's tokenizer, by which the samples are made.
    """
    component = cfg.teacher_model
    assert component is not None
    tokenizer, text = tokenizer_of(component, world), config_of(component).get_text_config()
    dtype = training_dtype(component)

    # 16 bits that lose nothing of the teacher's own, or as little as they can.
    wanted = cfg.teacher.dtype
    stored = STORED.get(wanted, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    vocabulary = tokenizer.get_vocab()
    made = Record(
        name_of(component),
        on_rank0(lambda: identity_of(name_of(component), component.kwargs), world),
        _name(dtype),
        _name(stored),
        text.hidden_size,
        text.vocab_size,
        1.0 if head is None else head.scale,
        None if head is None else head.softcap,
        len(vocabulary),
        max(vocabulary.values()),
        hash_vocabulary(vocabulary),
        hash_template(student),
        weights=_weights_of(cfg),
    )
    if cfg.teacher.keep == HIDDEN:
        return made
    rows = config_of(cfg.model).get_text_config().vocab_size
    partial = replace(
        made,
        keep=cfg.teacher.keep,
        k=cfg.teacher.k,
        temperature=temperature_of(cfg),
        shared=share_vocabulary(cfg, made, rows) or rows,
    )
    if partial.k >= partial.shared:
        expected = f"fewer than the {partial.shared} ids of the models"
        raise ConfigError([problem("teacher.k", partial.k, expected)])
    return partial


def _weights_of(cfg: RunConfig) -> str:
    return INT8 if cfg.teacher.placement == INT8 else ""


def temperature_of(cfg: RunConfig) -> float:
    """Return the temperature of a run's distillation loss."""
    return float(cfg.kd_losses[0].kwargs.get("temperature", 1.0))


def read_record(directory: Path) -> Record | None:
    """Return the record of a directory, or None if there is none.

    Raises:
        ConfigError: it cannot be read, or is of another version.
    """
    path = directory / CACHE_RECORD
    if not path.is_file():
        return None
    try:
        found = Record(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        hint = f"{path} cannot be read; delete the directory and write it again"
        raise ConfigError([_problem(directory, "a teacher's cache", hint)]) from error
    if found.format != _FORMAT:
        hint = f"it has format {found.format}; write it again"
        raise ConfigError([_problem(directory, f"a cache of format {_FORMAT}", hint)])
    return found


def write_record(directory: Path, record: Record) -> None:
    """Write the record, whole or not at all."""
    write_text(directory / CACHE_RECORD, json.dumps(asdict(record), indent=1) + "\n")


def refuse_other(cfg: RunConfig, found: Record, student: Any, world: World) -> None:
    """Refuse a cache of another teacher, tokenizer or kind of numbers than the config asks for.

    Args:
        student: the student's tokenizer.

    Raises:
        ConfigError: says what differs.
    """
    directory, component = Path(cfg.teacher.directory or ""), cfg.teacher_model
    vocabulary = student.get_vocab()
    if hash_vocabulary(vocabulary) != found.vocabulary:
        hint = (
            f"the student's tokenizer ({student.name_or_path}, {len(vocabulary)} tokens) gives ids "
            f"other tokens than that of {found.teacher} ({found.tokens} tokens), whose outputs are "
            f"there; choose a student of that family"
        )
        expected = "the cache of a teacher with the student's tokenizer"
        raise ConfigError([_problem(directory, expected, hint)])
    wanted = cfg.teacher.dtype
    if wanted != "auto" and _name(STORED[wanted]) != found.stored:
        hint = "write auto, or another directory"
        expected = f"{found.stored}, as the rows of {directory} are"
        raise ConfigError([problem("teacher.dtype", wanted, expected, hint)])
    _refuse_other_kind(cfg, found)
    if component is None:
        return

    # A model that is not at hand cannot be compared; its name is then all there is.
    here = on_rank0(lambda: identity_of(name_of(component), component.kwargs), world)
    is_other = here is not None and found.identity is not None and here != found.identity
    if is_other or (here is None and name_of(component) != found.teacher):
        hint = (
            f"teacher.directory {directory} holds the outputs of {found.teacher} "
            f"({found.identity}), and this is another model ({here or 'not at hand'}); name that "
            f"one, or another directory"
        )
        raise ConfigError([problem("teacher_model", name_of(component), "the cached one", hint)])
    if here is not None and _name(training_dtype(component)) != found.dtype:
        given = _name(training_dtype(component))
        expected = f"{found.dtype}, in which the outputs in {directory} were computed"
        raise ConfigError([problem("teacher_model.torch_dtype", given, expected)])
    if here is not None and cfg.teacher.fill and _weights_of(cfg) != found.weights:
        expected = f"{found.weights or 'another place than int8'}, as the outputs in {directory}"
        raise ConfigError([problem("teacher.placement", cfg.teacher.placement, expected)])


def _refuse_other_kind(cfg: RunConfig, found: Record) -> None:
    """Refuse a cache that keeps something else than the config asks for.

    Raises:
        ConfigError: names the key.
    """
    place, wanted = f"what {cfg.teacher.directory} keeps", cfg.teacher
    if wanted.keep != found.keep:
        raise ConfigError([problem("teacher.keep", wanted.keep, f"{found.keep}, {place}")])
    if found.keep == HIDDEN:
        return
    if wanted.k != found.k:
        raise ConfigError([problem("teacher.k", wanted.k, f"{found.k}, {place}")])
    if temperature_of(cfg) != found.temperature:
        key, expected = f"{cfg.kd_losses[0].key}.temperature", f"{found.temperature:g}, {place}"
        raise ConfigError([problem(key, temperature_of(cfg), expected)])
    rows = config_of(cfg.model).get_text_config().vocab_size
    if (share_vocabulary(cfg, found, rows) or rows) != found.shared:
        given = Path(cfg.teacher.directory or "")
        raise ConfigError([_problem(given, "a cache for a head of this student's size")])


def share_vocabulary(cfg: RunConfig, found: Record, student_rows: int) -> int | None:
    """Return the number of ids to compare, or None if both heads have the same number; see
    `causal_lm.common_vocab_size`.

    Raises:
        ConfigError: a head has fewer rows than the tokenizer has ids.
    """
    size = found.largest + 1
    if size > min(student_rows, found.rows):
        hint = (
            f"ids go up to {found.largest}, and the heads have {student_rows} (student) and "
            f"{found.rows} (teacher) rows"
        )
        given = cfg.teacher.directory or ""
        raise ConfigError([_problem(Path(given), "heads with a row for every token", hint)])
    return None if student_rows == found.rows else size


def hash_vocabulary(vocabulary: Mapping[str, int]) -> str:
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def hash_template(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's chat template."""
    return hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(directory: Path, expected: str, hint: str = "") -> str:
    return problem("teacher.directory", str(directory), expected, hint)
