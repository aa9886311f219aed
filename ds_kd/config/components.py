"""The objects behind the dotted names of a config, and how they are called.

A name is checked twice: its text before anything is imported (`ds_kd.config.permissions`), and the
object that it leads to.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ds_kd.config.names import home_of
from ds_kd.config.permissions import Permitted, refuse, translate
from ds_kd.config.text.secrets import BLANK, blank_known_secrets, blank_secrets, is_under_secret
from ds_kd.data.rows.declaration import DataSet
from ds_kd.errors import UserError, describe_user_error, first_line, is_of_own_code

_LONGEST = 1500  # characters of a problem


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each."""

    exit_code = 2
    is_of_config = True

    def __init__(self, problems: list[str]):
        self.problems = [_shorten(blank_known_secrets(line)) for line in problems]
        super().__init__(self.text())

    def text(self, excerpts: bool = False) -> str:
        """Return all problems as one text.

        Args:
            excerpts: add the lines of the YAML where each problem stands.
        """
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)} in the config"
        lines = [count]
        for told in self.problems:
            first, *excerpt = told.split("\n")
            lines.append(f"  - {first}")
            lines += [f"      {line}" for line in excerpt] if excerpts else []
        return "\n".join(lines)

    # Rank 0 pickles the error for the other ranks; by default pickle would pass the text alone.
    def __reduce__(self) -> tuple:
        return type(self), (self.problems,)


def _shorten(line: str) -> str:
    """Return a problem with the middle left out where its first line would fill the screen."""
    first, *excerpt = line.split("\n")
    if len(first) > _LONGEST:
        first = f"{first[: _LONGEST // 2]} … {first[-_LONGEST // 2 :]}"
    return "\n".join([first, *excerpt])


def problem(key: str, given: Any, expected: str, hint: str = "") -> str:
    """Return one line of a `ConfigError`; long values are cut, secret ones not shown."""
    shown = BLANK if is_under_secret(key) else repr(blank_secrets(given))
    shown = shown if len(shown) <= 300 else f"{shown[:300]}…"
    line = f"{key}: got {shown}, expected {expected}" + (f"; {hint}" if hint else "")
    return " ".join(line.splitlines())


@contextmanager
def config_error(key: str, given: Any, expected: str) -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of this block into a ConfigError about `key`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError([problem(key, given, expected, first_line(error))]) from error


@dataclass(frozen=True)
class Component:
    """A `_target_` section: the callable and its arguments. `load` makes permitted ones only.

    Args:
        name: dotted name of the callable, after the translation of NeMo-AutoModel's names.
        kwargs: its keyword arguments.
        key: the section's name in the YAML.
        declaration: a data set's own, if it has one; see `ds_kd.data.rows.declaration`.
        parts: weight and component of each part of a weighted sum of losses, which has no callable
            of its own.
    """

    name: str
    kwargs: dict[str, Any]
    key: str
    declaration: DataSet | None = None
    parts: tuple[tuple[float, Component], ...] = ()

    @property
    def is_without_answers(self) -> bool:
        """Return whether this is a data set of prompts alone."""
        return self.declaration is not None and not self.declaration.has_answers


def resolve(dotted: str) -> Any:
    """Return the object behind a permitted name.

    Raises:
        ConfigError: the name is refused (nothing is imported then), does not exist, leads out of
            ds_kd, or its module is the user's own and fails.
    """
    if refusal := refuse(dotted):
        raise ConfigError([refusal])
    name = home_of(translate(dotted))
    parts = name.split(".")

    # The longest prefix that can be imported is the module; the rest are attributes.
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except Exception as error:  # a user's module may raise anything
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                continue
            if isinstance(dotted, Permitted) and is_of_own_code(error):
                told = describe_user_error(error)
                raise ConfigError([f"{dotted} cannot be imported: {told}"]) from error
            raise
        for part in parts[split:]:
            if not hasattr(found, part):
                raise ConfigError([f"{dotted!r}: {'.'.join(parts[:split])} has no {part}"])
            found = getattr(found, part)
            if inspect.ismodule(found):  # reached through a module's own imports, not by its name
                raise ConfigError([f"{dotted!r} leads through the module {found.__name__}"])

        # A name that a module of ds_kd merely imports would lead out of the permitted ones.
        if name.startswith("ds_kd.") and (
            not callable(found)
            or f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}" != name
        ):
            raise ConfigError([f"{dotted!r} is not defined in ds_kd"])
        return found
    raise ConfigError([f"{dotted!r}: no such module"])


def _resolve_functions(component: Component) -> dict[str, Any]:
    """Return the component's arguments, with each `…_fn` name replaced by its function."""
    return {
        name: resolve(value) if name.endswith("_fn") and isinstance(value, str) else value
        for name, value in component.kwargs.items()
    }


def bind(component: Component, also: tuple[str, ...] = (), **extra: Any) -> Any:
    """Return the callable, after checking that it takes these arguments.

    Args:
        also: keys of the section that ds_kd takes, for the message.

    Raises:
        ConfigError: an argument is unknown, of a wrong type, or missing.
    """
    function = resolve(component.name)
    parameters = inspect.signature(function).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    annotations = {name: p.annotation for name, p in parameters.items()}
    problems = find_wrong_arguments(component, annotations, is_open, tuple(extra), also)
    if problems:
        raise ConfigError(problems)
    try:
        inspect.signature(function).bind(**component.kwargs, **extra)
    except TypeError as error:
        raise ConfigError(
            [f"{component.key}: {error}; {component.name} takes {', '.join(annotations)}"]
        ) from None
    return function


def find_wrong_arguments(
    component: Component,
    annotations: Mapping[str, Any],
    is_open: bool,
    given: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> list[str]:
    """Return the problems of a component's arguments, one line each.

    Args:
        annotations: argument → its annotation, an object or text.
        is_open: whether it takes other arguments too.
        given: arguments that ds_kd passes itself.
        also: keys of the section that ds_kd takes.
    """
    takes = [*dict.fromkeys([*(name for name in annotations if name not in given), *also])]
    problems = []
    for name, value in component.kwargs.items():
        key = f"{component.key}.{name}"
        if name in given:
            problems.append(f"{key}: ds_kd gives it itself; remove it")
        elif name in annotations:
            if expected := _find_mismatch(value, annotations[name]):
                problems.append(problem(key, value, expected))
        elif name not in also and not is_open:
            near = difflib.get_close_matches(name, takes, n=1)
            hint = f"did you mean {component.key}.{near[0]}?" if near else ""
            hint = hint or f"{component.name} takes {', '.join(takes)}"
            problems.append(f"{key}: unknown key; {hint}")
    return problems


def _find_mismatch(value: Any, annotation: Any) -> str:
    """Return the expected type of a plain value that has another one, else an empty text."""
    if isinstance(annotation, str):  # from __future__ import annotations
        annotation = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", annotation)
        names = {part.strip() for part in annotation.split("|")}
    else:
        kinds = typing.get_args(annotation) or (annotation,)
        names = {getattr(kind, "__name__", str(kind)) for kind in kinds}
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    nothing = {"None", "NoneType"}
    if not names & set(words) or not names <= {*words, *nothing, "Tensor"}:
        return ""
    allowed = names | ({"int"} if "float" in names else set())
    kind = "str" if isinstance(value, str) else type(value).__name__
    if kind in allowed or (value is None and names & nothing):
        return ""
    return " or ".join(word for name, word in words.items() if name in names)


def instantiate(component: Component, also: tuple[str, ...] = (), **extra: Any) -> Any:
    """Call the component with its arguments and `extra`.

    Raises:
        ConfigError: as `bind`, a value of a wrong type, or an error of a user's own code.
        ValueError: the callable refuses an argument.
    """
    function = bind(component, also, **extra)
    try:
        return function(**_resolve_functions(component), **extra)
    except UserError:
        raise
    except Exception as error:  # code of the user's may raise anything
        is_own = isinstance(component.name, Permitted)
        if not (isinstance(error, TypeError) or (is_own and is_of_own_code(error))):
            raise
        told = describe_user_error(error) if is_own else error
        raise ConfigError([f"{component.key}: {told}"]) from error
