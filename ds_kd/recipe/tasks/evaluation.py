"""Evaluate models of the disk or the hub: load each as a run would, and put a task to it."""

from __future__ import annotations

import difflib
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import nn

from ds_kd import __version__
from ds_kd.config.checks.data import find_wrong_source
from ds_kd.config.components import Component, ConfigError
from ds_kd.config.names import MODEL
from ds_kd.config.task import METRICS, TaskFile, load_task
from ds_kd.data.rows.source import refuse_to_replace
from ds_kd.errors import UserError, first_line
from ds_kd.evaluate.journal import Journal, fingerprint
from ds_kd.evaluate.results import Evaluated, format_table, summarize, write_json
from ds_kd.evaluate.run import (
    Items,
    is_plain_text,
    load_items,
    plan_batches,
    run_task,
    tokens_of_batch,
)
from ds_kd.evaluate.subject import Subject, can_branch
from ds_kd.evaluate.tasks.builtin import BUILTIN, PLAIN_TEXT
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.evaluate.tasks.kinds import Task
from ds_kd.evaluate.tasks.own import make_task
from ds_kd.files import check_replaceable
from ds_kd.losses.head import States
from ds_kd.models import causal_lm, probes
from ds_kd.models.files.model_files import identity_of
from ds_kd.parallel.world import World, on_rank0, rank0_first
from ds_kd.recipe.data import NO_LIMIT
from ds_kd.recipe.models import (
    check_files,
    check_whole,
    config_of,
    refuse_damage,
    tokenizer_of,
    training_dtype,
)


class EvaluationError(UserError):
    """A model, task, file or option that cannot be evaluated."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """The options of `launch/evaluate.py` that decide numbers or their place.

    Args:
        data: rows; see `load_rows`.
        limit: take only the first rows, this many.
        dtype: of the models: `auto`, `bf16` or `fp32`.
        batch_size: the most samples of a batch.
        output: JSON to write; its folder of records is beside it.
    """

    data: str
    limit: int | None = None
    dtype: str = "auto"
    batch_size: int | None = None
    output: Path | None = None


def find_task(name: str) -> Task:
    """Return the task that `--task` names.

    Raises:
        EvaluationError: there is none of that name, or the YAML describes none.
        ConfigError: keys of the YAML are wrong.
    """
    if name not in BUILTIN and not name.endswith((".yaml", ".yml")):
        known = ", ".join(BUILTIN)
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise EvaluationError(f"--task: got {name!r}, expected {known} or a task's .yaml{hint}")
    try:
        return make_named_task(name)
    except ValueError as error:
        raise EvaluationError(f"--task {name}: {error}") from error


def make_named_task(name: str) -> Task:
    """Return a task of the package by its name, or a user's own by its YAML.

    Raises:
        ValueError: a text of the YAML is not of Jinja's language.
        ConfigError: keys of the YAML are wrong.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    given = load_task(name)
    return make_task(
        Path(name).stem,
        str(given.kind),
        given.prompt,
        given.choices,
        str(given.reference),
        given.columns,
        **_select_options(given),
    )


#: A brace that the module `regex` reads as errors to allow.
_FUZZY = regex.compile(r"(?<!\\)\{\d*\s*(<=?)?\s*[eids]\s*(<=?\s*\d+)?\s*[,:}+][^}]*\}?")


def _select_options(given: TaskFile) -> dict[str, Any]:
    """Return the arguments of a kind's class that its YAML sets.

    Raises:
        ValueError: the regular expression is none.
    """
    if given.kind == "multiple_choice":
        return {"gap": given.delimiter}
    if given.kind == "perplexity":
        return {}
    _check_pattern(given.regex or "")
    return {
        "scores": tuple(given.metrics or METRICS),
        "stop": tuple(given.stop or ["\n"]),
        "new_tokens": given.max_new_tokens,
        "uses_chat": given.chat,
        "pattern": given.regex,
    }


def _check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression, or means another one to `regex` than to `re`.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"regex: {pattern!r} is no regular expression: {error}") from None
    if found := _FUZZY.search(pattern):
        raise ValueError(
            f"regex: {found[0]!r} in {pattern!r} would allow errors in what is found; write "
            f"\\{{ for a brace"
        )


def evaluate(
    models: list[str], teacher: str | None, task: Task, options: Options, world: World
) -> str:
    """Evaluate models, write the results if there is an output, and return them as a table.

    Args:
        models: directories or hub ids.
        teacher: to which a task compares them.

    Raises:
        EvaluationError: something that the command names does not exist or fit.
    """
    if options.output is not None:
        with _blame("--output", str(options.output)):
            on_rank0(lambda: _check_output(options), world)
    with _blame("--data", options.data):
        task = rank0_first(lambda: _fit_given_task(task, options.data), world)

    # A teacher stays in memory for all models, which come one after the other.
    against = None
    if task.needs_teacher and teacher is not None:
        against = Loaded("--teacher", teacher, options.dtype, world)
    evaluated = [_evaluate_one(name, against, task, options, world) for name in models]

    about = {
        "data": options.data,
        "limit": options.limit,
        "dtype": options.dtype,
        "teacher": teacher if task.needs_teacher else None,
        "versions": {"ds_kd": __version__, "torch": str(torch.__version__)},
    }
    results = summarize(task.name, task.metrics, evaluated, about)
    if options.output is not None and world.is_main:
        with _blame("--output", str(options.output)):
            write_json(options.output, results)
    return format_table(results, task.metrics)


def _fit_given_task(task: Task, data: str) -> Task:
    if wrong := find_wrong_source("--data", data):
        raise EvaluationError(wrong)
    return fit_task(task, data)


def fit_task(task: Task, data: str) -> Task:
    """Return the task for these rows: of plain text all tokens are predicted, of samples the
    supervised ones.

    Raises:
        ValueError: the rows cannot be read.
    """
    is_perplexity = task is BUILTIN["perplexity"]
    return PLAIN_TEXT if is_perplexity and is_plain_text(data) else task


def _evaluate_one(
    name: str, against: Loaded | None, task: Task, options: Options, world: World
) -> Evaluated:
    loaded = Loaded("--model", name, options.dtype, world)
    vocab = loaded.share_vocabulary(against) if against is not None else 0
    encoder = loaded.encoder if against is None else loaded.encoder.read_no_more(against.encoder)
    with _blame("--data", options.data):
        items = rank0_first(lambda: load_items(task, options.data, options.limit, encoder), world)
    key = _identify(loaded, against, task, items)
    title = {"model": name, "task": task.name, "data": options.data, "limit": options.limit}
    journal = Journal(_folder_of(options), key, title, items.rows, world.rank)

    # The model is loaded last: rows are refused without it.
    tokens = tokens_of_batch(world.device.type)
    batches = plan_batches(task, items.items, tokens, options.batch_size or len(items.items))
    told = f"{task.name} of {name}"
    load = lambda: loaded.load(against, vocab)  # noqa: E731
    records = run_task(task, load, items.items, batches, world, journal, told)
    rows = [*dict.fromkeys(items.rows)]
    return Evaluated(name, items.merge(records), rows, items.total)


def _folder_of(options: Options) -> Path | None:
    output = options.output
    return None if output is None else output.with_name(f"{output.stem}.samples")


def _check_output(options: Options) -> None:
    """Make the folders of the output, before hours are spent on what cannot be written.

    Raises:
        OSError: they cannot be made, or written to.
    """
    assert options.output is not None
    refuse_to_replace(options.data, options.output)
    check_replaceable(options.output)
    folder = _folder_of(options)
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    for directory in (folder, options.output.parent):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{directory} cannot be written")


def _identify(loaded: Loaded, against: Loaded | None, task: Task, items: Items) -> str:
    """Return the fingerprint of everything that decides the records."""
    models = [(each.identity, str(each.dtype)) for each in (loaded, against) if each is not None]
    return fingerprint(__version__, task.rules, models, items.rows, items.items)


def _hash_settings(directory: Path) -> str:
    """Return a hash of the files that decide where a text ends and how tokens are read; that of
    nothing for a hub id, whose commit says it."""
    sha = hashlib.sha256()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (path := directory / name).is_file():
            sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


class _Alone(nn.Module):
    """A model on one rank, called as a DeepSpeed engine is."""

    def __init__(self, module: causal_lm.FrozenModel):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Loaded:
    """A model's tokenizer and configuration, and, from `load` on, the model.

    Args:
        option: that names it, for messages.
        name: directory or hub id.
        dtype: `auto`, or one of `causal_lm.DTYPES`.
    """

    def __init__(self, option: str, name: str, dtype: str, world: World):
        self.option, self.name, self.world = option, name, world
        self.component = Component(MODEL, {"pretrained_model_name_or_path": name}, option)
        with _blame(option, name):
            self.tokenizer = tokenizer_of(self.component, world)
            self.config = config_of(self.component)
            self.dtype = self._choose_dtype(dtype)
        self.encoder = Encoder(self.tokenizer, find_longest(self.config, self.tokenizer))
        self.identity = f"{identity_of(name, {}) or name} {_hash_settings(Path(name))}"
        self._engine: _Alone | None = None

    def _choose_dtype(self, wanted: str) -> torch.dtype:
        if wanted != "auto":
            return causal_lm.DTYPES[wanted]
        is_cpu = self.world.device.type == "cpu"
        return torch.float32 if is_cpu else training_dtype(self.component)

    def share_vocabulary(self, teacher: Loaded) -> int:
        """Return the number of ids that both models share.

        Raises:
            EvaluationError: their tokenizers differ.
        """
        rows = [each.config.get_text_config().vocab_size for each in (self, teacher)]
        with _blame(teacher.option, teacher.name):
            shared = causal_lm.common_vocab_size(self.tokenizer, teacher.tokenizer, *rows)
        return int(shared or rows[0])

    def load(self, against: Loaded | None, vocab: int) -> Subject:
        """Return the model, ready to be evaluated."""
        teacher = None if against is None else _as_teacher(against.engine())
        engine = self.engine()
        subject = Subject(engine, self.tokenizer, self.world.device, False, teacher, vocab)
        subject.shares_prefix = can_branch(subject)
        return subject

    def engine(self) -> _Alone:
        """Return the model, loaded and checked once.

        Raises:
            EvaluationError: it cannot be loaded, its files lack weights, or it has no linear head.
        """
        if self._engine is None:
            with _blame(self.option, self.name):
                module = causal_lm.FrozenModel(rank0_first(self._read, self.world))
                self._engine = _Alone(module).eval()
                probes.check_head(self._engine, self.world.device, "the model")
        return self._engine

    def _read(self) -> Any:
        from transformers import AutoModelForCausalLM

        gc.collect()  # the model before this one
        ties = refuse_damage(lambda: check_files(self.component))
        extra = {"tie_word_embeddings": False} if ties else {}
        loaded = refuse_damage(
            lambda: AutoModelForCausalLM.from_pretrained(
                self.name,
                dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
            )
        )
        return check_whole(loaded, ties).to(self.world.device)


@contextmanager
def _blame(option: str, given: str) -> Iterator[None]:
    """Turn what this block raises for a user to read into one sentence about an option."""
    try:
        yield
    except ConfigError as error:
        expected = error.problems[0].partition(", expected ")[2]
        raise EvaluationError(f"{option}: got {given!r}, expected {expected}") from error
    except (ValueError, OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        told = reason if given in reason else f"got {given!r}: {reason}"
        raise EvaluationError(f"{option}: {told}") from error


def _as_teacher(engine: _Alone) -> Any:
    return lambda batch: States(engine(batch), engine.module.head())


def find_longest(config: Any, tokenizer: Any) -> int | None:
    """Return the most tokens that a model reads at once, or None if nothing names a limit."""
    named = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [named, tokenizer.model_max_length]
    return next((int(n) for n in limits if isinstance(n, int) and 0 < n < NO_LIMIT), None)
