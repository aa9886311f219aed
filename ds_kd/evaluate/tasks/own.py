"""A user's own task: templates over the columns of a row, in Jinja's language."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_kd.errors import first_line
from ds_kd.evaluate.tasks.kinds import Generation, MultipleChoice, Perplexity, Row, Task


@dataclass(frozen=True)
class Value:
    """A value of a row.

    Args:
        key: of the YAML, for messages.
        columns: names that it reads.
        read: returns the value, given the row's columns by name.
    """

    key: str
    columns: frozenset[str]
    read: Callable[[Row], Any]

    def text(self, row: Row) -> str:
        """Return the value as text.

        Raises:
            ValueError: it is none, and no number.
        """
        value = self.read(row)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{self.key} is {value!r:.80}, expected text")
        return str(value)


_MOST = 10_000  # characters that a product has in a template, and the largest base or exponent


@functools.cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    class Bounded(SandboxedEnvironment):
        """An environment whose products of texts and powers are bounded: a slip would use up memory
        and time."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = [abs(each) for each in (left, right) if isinstance(each, int)]
            sizes = [len(each) for each in (left, right) if hasattr(each, "__len__")]
            most = max(numbers, default=0) if operator == "**" else math.prod(numbers + sizes)
            if most > _MOST and (operator == "**" or sizes):
                raise OverflowError(
                    f"{operator} {min(most, 10**300):.3g}, and {_MOST} at most is computed"
                )
            return super().call_binop(context, operator, left, right)

    # An environment is made once: compiling a template is slow otherwise.
    made = Bounded(undefined=StrictUndefined, keep_trailing_newline=True)
    made.globals.pop("lipsum", None)  # writes any amount of text
    return made


def compile_value(key: str, text: str) -> Value:
    """Return the value of a text with `{{…}}`, or of an expression such as a column's name.

    Raises:
        ValueError: it is not of Jinja's language; names the key.
    """
    from jinja2 import TemplateError, Undefined, meta

    environment = _environment()
    is_template = "{{" in text or "{%" in text
    try:
        names = meta.find_undeclared_variables(
            environment.parse(text if is_template else f"{{{{ ({text}) }}}}")
        )
        found = (
            environment.from_string(text).render
            if is_template
            else environment.compile_expression(text, undefined_to_none=False)
        )
    except TemplateError as error:
        raise ValueError(
            f"{key}: got {text!r}, expected a column's name, an expression of Jinja or a text "
            f"with {{{{column}}}}; {first_line(error)}"
        ) from None

    def read(row: Row) -> Any:
        try:
            value = found(**row)
        # Whatever an expression may raise on the values of this row.
        except Exception as error:
            raise ValueError(f"{key}: {first_line(error)}") from None
        if isinstance(value, Undefined):
            raise ValueError(f"{key}: {text} is not in this row")
        return value

    return Value(key, frozenset(names - set(environment.globals)), read)


def compile_text(key: str, text: str) -> Value:
    """Return the value of a text with `{{…}}`, or of a text that is the same for all rows."""
    if "{{" in text or "{%" in text:
        return compile_value(key, text)
    return Value(key, frozenset(), lambda row: text)


def make_task(
    name: str,
    kind: str,
    prompt: str | None,
    choices: Any,
    reference: str,
    columns: dict[str, str],
    **options: Any,
) -> Task:
    """Return a task.

    Args:
        name: in the results.
        kind: `multiple_choice`, `generation` or `perplexity`.
        prompt: a template; None for a text without a context.
        choices: a list of templates, or an expression; for a multiple choice.
        reference: an expression or a template.
        columns: name in templates → column.
        options: of the kind's class.

    Raises:
        ValueError: a text is not of Jinja's language; names the key.
    """
    asked = compile_text("prompt", prompt or "")
    right = compile_value("reference", reference)
    endings = _compile_choices(choices)

    # The rows are read by their own names for columns, the templates by those of the task.
    values = [asked, right, *(endings if isinstance(endings, list) else [endings])]
    names = sorted(frozenset().union(*(value.columns for value in values)))
    wanted = tuple(dict.fromkeys(columns.get(each, each) for each in names))

    def rename(row: Row) -> Row:
        return {each: row[columns.get(each, each)] for each in names}

    if kind == "multiple_choice":
        return MultipleChoice(
            name,
            wanted,
            lambda row: _read_choice(asked, endings, right, rename(row)),
            **options,
        )
    if kind == "generation":
        return Generation(
            name,
            wanted,
            lambda row: (asked.text(rename(row)), _read_references(right, rename(row))),
            **options,
        )
    return Perplexity(name, wanted, lambda row: (asked.text(rename(row)), right.text(rename(row))))


def _read_choice(
    asked: Value, endings: Value | list[Value], right: Value, row: Row
) -> tuple[str, list[str], int]:
    texts = _read_texts(endings, row)
    return asked.text(row), texts, _find_right(right.read(row), texts)


def _compile_choices(choices: Any) -> Value | list[Value]:
    if isinstance(choices, list):
        return [compile_text(f"choices[{k}]", text) for k, text in enumerate(choices)]
    return [] if choices is None else compile_value("choices", choices)


def _read_texts(choices: Value | list[Value], row: Row) -> list[str]:
    if isinstance(choices, list):
        return [choice.text(row) for choice in choices]
    texts = choices.read(row)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choices is {texts!r:.80}, expected a list of texts")
    if len(texts) < 2:
        raise ValueError(f"choices is {texts!r:.80}, expected two or more")
    return texts


def _find_right(value: Any, choices: list[str]) -> int:
    """Return the number of the choice that a reference names by its number or its text."""
    if isinstance(value, str) and value.strip() in (bare := [each.strip() for each in choices]):
        return bare.index(value.strip())
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"reference is {value!r:.80}, expected a number from 0 to {len(choices) - 1} or the text "
        f"of one of the choices"
    )


def _read_references(reference: Value, row: Row) -> list[str]:
    value = reference.read(row)
    texts = value if isinstance(value, list) else [reference.text(row)]
    if not all(isinstance(text, (str, int, float)) for text in texts):
        raise ValueError(f"reference is {value!r:.80}, expected text or a list of texts")
    return [str(text) for text in texts]
