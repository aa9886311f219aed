"""A user's own task: the keys of its YAML, each with its sentence, and their check."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_kd.config.checks.data import find_wrong_source, may_hold
from ds_kd.config.checks.files import is_directory
from ds_kd.config.checks.sections import check_section
from ds_kd.config.components import ConfigError, problem
from ds_kd.config.keys import key
from ds_kd.config.text.yaml_source import read
from ds_kd.data.rows.detect import columns_known, recognise
from ds_kd.data.rows.files import columns_of, files_of
from ds_kd.errors import first_line

KINDS = ("multiple_choice", "generation", "perplexity")
#: The tasks that need no YAML, and the one of them that compares with a teacher.
BUILTIN = ("hellaswag", "squad", "perplexity", "kl")
WITH_TEACHER = "kl"
#: The columns of those whose rows have a form of their own.
COLUMNS = {
    "hellaswag": ("ctx", "endings", "label"),
    "squad": ("context", "question", "answers"),
}
METRICS = ("exact_match", "f1")


@dataclass
class TaskFile:
    """The keys of a task. A value of a row is written as an expression of Jinja, such as a column's
    name, and a text as a template, such as `Question: {{question}}`."""

    kind: Literal["multiple_choice", "generation", "perplexity"] | None = key(
        None, "Choose the likeliest of several endings, generate an answer, or predict a text."
    )
    prompt: str | None = key(
        None, "The text before the ending, the answer or the text; a template."
    )
    choices: Any = key(None, "The endings: the column of a list of texts, or a list of templates.")
    reference: str | None = key(
        None,
        "The number of the right choice, counted from 0, or its text; the right answer, or a list "
        "of them; the text to predict.",
    )
    columns: dict = key(dict, "Other names for columns, as name: column.")
    delimiter: str = key(" ", "Text between the prompt and each choice.")
    metrics: list = key(list, "`exact_match` and `f1`, in the wording of SQuAD; both by default.")
    regex: str | None = key(
        None,
        "Compare only what this expression finds first in the answer, its group if it has one.",
    )
    stop: list = key(list, "Texts that end an answer; by default a line break.")
    max_new_tokens: int = key(
        64, "The most tokens of an answer.", unit="tokens", low=1, high=1_000_000
    )
    chat: bool = key(False, "Ask with the tokenizer's chat template, the prompt as user's turn.")


_NEEDED = {
    "multiple_choice": ("prompt", "choices", "reference"),
    "generation": ("prompt", "reference"),
    "perplexity": ("reference",),
}
_OPTIONAL = {
    "multiple_choice": ("delimiter",),
    "generation": ("metrics", "regex", "stop", "max_new_tokens", "chat"),
    "perplexity": ("prompt",),
}


def load_task(path: str | Path) -> TaskFile:
    """Return the checked keys of a task's YAML.

    Raises:
        ConfigError: lists all problems.
    """
    data, _, source = read(path, [])
    with source.add_places():
        problems: list[str] = []
        task = TaskFile(**check_section(TaskFile, data, "", problems))
        if not any(line.startswith("kind:") for line in problems):
            problems += _find_contradictions(task, data)
        if problems:
            raise ConfigError(problems)
        return task


def find_wrong_entry(key: str, entry: dict[str, Any]) -> list[str]:
    """Return what is wrong with an entry of a run's `evaluation.tasks`: its task, or its file."""
    name, data = entry["task"], entry["data"]
    columns: tuple[str, ...] = COLUMNS.get(name, ())
    if name.endswith((".yaml", ".yml")):
        try:
            columns = find_columns(load_task(name))
        except ConfigError as error:
            return [f"{key}: {line}" for line in error.problems]
    elif name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        return [problem(f"{key}.task", name, f"{', '.join(BUILTIN)} or a task's .yaml", hint)]
    wrong = find_wrong_source(f"{key}.data", data)
    return [wrong] if wrong else _find_wrong_columns(f"{key}.data", columns, data)


def find_columns(task: TaskFile) -> tuple[str, ...]:
    """Return the columns that the templates of a task read, by the names that the rows have."""
    from jinja2 import Environment, meta

    environment = Environment()
    trees = [environment.parse(_as_template(*each)) for each in _list_texts(task)]
    found = set[str]().union(*map(meta.find_undeclared_variables, trees))
    names = sorted(found - {*environment.globals})
    return tuple(dict.fromkeys(task.columns.get(name, name) for name in names))


def _find_wrong_columns(key: str, columns: tuple[str, ...], data: str) -> list[str]:
    """Return the problem of files that lack the columns of a task. One without columns of its own
    takes the rows of any data set."""
    expected = f"rows with {', '.join(columns) or columns_known()}"
    files = files_of(data)
    if files is None and columns and is_directory(data) and not may_hold(Path(data), columns):
        return [problem(key, data, f"a directory of {expected}", "none of its files has them")]
    for name in files or ():
        try:
            found = columns_of(name)
        except (OSError, ValueError, RecursionError) as error:
            return [problem(key, name, expected, first_line(error))]
        if not ({*columns} <= {*found} if columns else recognise(found)):
            return [problem(key, name, expected, f"its first row has {', '.join(found)}")]
    return []


def _find_contradictions(task: TaskFile, data: dict[str, Any]) -> list[str]:
    """Return what is wrong with keys that are right one by one."""
    if task.kind is None:
        return [f"kind: missing; write one of {', '.join(KINDS)}"]
    needed, optional = _NEEDED[task.kind], _OPTIONAL[task.kind]
    found = [
        f"{name}: missing; kind: {task.kind} needs {', '.join(needed)}"
        for name in needed
        if name not in data
    ]

    # A key of another kind would have no effect without a word.
    takes = ("kind", "columns", *needed, *optional)
    known = set(TaskFile.__dataclass_fields__)
    found += [
        f"{name}: kind: {task.kind} does not take it (it takes {', '.join(takes)}); remove it"
        for name in data
        if name in known and name not in takes
    ]

    return found + _find_wrong_values(task)


def _find_wrong_values(task: TaskFile) -> list[str]:
    """Return what is wrong inside lists, mappings and templates."""
    choices, found = task.choices, _find_wrong_templates(task)
    if isinstance(choices, list):
        found += [
            problem(f"choices[{k}]", each, "text", "put it in quotes")
            for k, each in enumerate(choices)
            if not isinstance(each, str)
        ]
        if len(choices) < 2:
            found.append(problem("choices", choices, "two choices or more"))
    elif choices is not None and not isinstance(choices, str):
        found.append(problem("choices", choices, "a column's name or a list of texts"))

    # Names of metrics and of columns are checked one by one, as each is a mistake of its own.
    for name in task.metrics:
        if name not in METRICS:
            found.append(problem("metrics", name, " or ".join(METRICS)))
    for name, column in task.columns.items():
        if not isinstance(column, str):
            found.append(problem(f"columns.{name}", column, "the name of a column"))
    return found


def _find_wrong_templates(task: TaskFile) -> list[str]:
    """Return the problem of each text that is not of Jinja's language."""
    from jinja2 import Environment, TemplateError

    found = []
    for name, text in _list_texts(task):
        try:
            Environment().parse(_as_template(name, text))
        except TemplateError as error:
            expected = "a column's name, an expression of Jinja or a text with {{column}}"
            found.append(problem(name, text, expected, first_line(error)))
    return found


def _list_texts(task: TaskFile) -> list[tuple[str, str]]:
    """Return the key and the text of each template and expression."""
    several = task.choices if isinstance(task.choices, list) else []
    texts = {f"choices[{k}]": text for k, text in enumerate(several)}
    texts |= {"prompt": task.prompt, "reference": task.reference}
    texts |= {} if several else {"choices": task.choices}
    return [(name, text) for name, text in texts.items() if isinstance(text, str)]


def _as_template(name: str, text: str) -> str:
    """Return a text as a template, as `evaluate.tasks.own` reads it: a reference, or choices that
    are no list, may be an expression without braces."""
    is_bare = name in ("reference", "choices") and "{{" not in text and "{%" not in text
    return f"{{{{ ({text}) }}}}" if is_bare else text
