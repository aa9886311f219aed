"""The keys of the YAML and the kinds of value that they hold.

A key is a field of a dataclass in `ds_kd.config.schema` or `sections`. Its annotation names its
kind. A kind converts a value to its own type, and describes its values in words and as JSON
Schema. A new kind is one entry in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeGuard

_LARGEST = 1e30


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that fits all computations; a bool is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < _LARGEST and math.isfinite(value)


@dataclass(frozen=True, eq=False)  # hashed as an annotation is
class Kind:
    """One kind of value.

    Args:
        words: a description of its values, for messages.
        json: the same as JSON Schema.
        read: returns a value in the kind's own type; raises a ValueError, whose text is a hint,
            for a value of another kind.
        keeps_text: keep the text of an environment variable as text, even if it is a number.
    """

    words: str
    json: Mapping[str, Any]
    read: Callable[[Any], Any]
    keeps_text: bool = False


def _make_quotes_error(value: Any) -> ValueError:
    """Return the error for a value that is no number, with a hint if it is one in quotes."""
    is_quoted = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value)
    return ValueError("write it without quotes" if is_quoted else "")


def _read_integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _make_quotes_error(value)


def _read_number(value: Any) -> float:
    if is_number(value):
        return float(value)
    raise _make_quotes_error(value)


def _read_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("put it in quotes" if isinstance(value, (int, float)) else "")


def _read_names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return names
    raise ValueError


def _make_instance_reader(of: Any) -> Callable[[Any], Any]:
    """Return a reader that accepts instances of a type and leaves them unchanged."""

    def read(value: Any) -> Any:
        if isinstance(value, of):
            return value
        raise ValueError

    return read


def _read_max_norm(value: Any) -> float:
    if isinstance(value, dict) and set(value) <= {"max_norm"}:
        value = value.get("max_norm")
    if is_number(value) and value > 0:
        return float(value)
    raise ValueError


def _read_every(value: Any) -> int | str:
    if value == "epoch" or (is_number(value) and isinstance(value, int) and value >= 1):
        return value
    raise _make_quotes_error(value)


def _read_every_or_end(value: Any) -> int | str:
    if value == "end" or (is_number(value) and isinstance(value, int) and value >= 1):
        return value
    raise _make_quotes_error(value)


def _read_auto_or_count(value: Any) -> int | str:
    if value == "auto" or (is_number(value) and isinstance(value, int) and value >= 1):
        return value
    raise _make_quotes_error(value)


def _read_tasks(value: Any) -> list[dict[str, Any]]:
    """Return the entries of a list of tasks, each with its task, its data and perhaps a limit."""
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError
    for entry in entries:
        if not isinstance(entry, dict) or not {"task", "data"} <= set(entry) <= set(_OF_TASK):
            raise ValueError(f"one is {entry!r:.80}; its keys are {', '.join(_OF_TASK)}")
        limit = entry.get("limit", 1)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"its limit is {limit!r}, expected an integer ≥ 1")
        for name in ("task", "data"):
            if not isinstance(entry[name], str):
                raise ValueError(f"its {name} is {entry[name]!r:.80}, expected text")
    return entries


def _read_one(value: Any) -> int:
    if value == 1 and not isinstance(value, bool):
        return 1
    raise ValueError


def _read_no_pipeline(value: Any) -> int:
    if value == 1 and not isinstance(value, bool):
        return 1
    raise ValueError("write tp_size or cp_size, or start more ranks")


def _read_nemo_name(value: Any) -> str:
    if isinstance(value, str) and value.startswith("nemo_automodel."):
        return value
    raise ValueError


def _make_choice(among: tuple[Any, ...]) -> Kind:
    """Return the kind of a choice between words; `true` and `false` may also be YAML booleans."""

    def read(value: Any) -> Any:
        word = value if value in among or not isinstance(value, bool) else str(value).lower()
        if any(type(word) is type(choice) and word == choice for choice in among):
            return word
        raise ValueError

    switches = [word == "true" for word in among if word in ("true", "false")]
    words = " or ".join(str(choice).lower() for choice in among)
    return Kind(words, {"enum": [*among, *switches]}, read)


#: Type of an annotation → its kind.
_KINDS: dict[Any, Kind] = {
    int: Kind("an integer", {"type": "integer"}, _read_integer),
    float: Kind("a number", {"type": "number"}, _read_number),
    bool: Kind("true or false", {"type": "boolean"}, _make_instance_reader(bool)),
    str: Kind("text", {"type": "string"}, _read_text, keeps_text=True),
    dict: Kind("a mapping", {"type": "object"}, _make_instance_reader(dict), keeps_text=True),
    list: Kind(
        "a list of names",
        {"type": ["array", "string"], "items": {"type": "string"}},
        _read_names,
        keeps_text=True,
    ),
    Any: Kind("anything", {}, _make_instance_reader(object)),
    type(None): Kind("null", {"type": "null"}, _make_instance_reader(type(None))),
}
_MAX_NORM = Kind(
    "a number > 0 or {max_norm: number}, or nothing for no clipping",
    {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "object", "properties": {"max_norm": {"type": "number"}}},
        ]
    },
    _read_max_norm,
)
_EVERY = Kind(
    "an integer ≥ 1, or epoch",
    {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "epoch"}]},
    _read_every,
)
_ONE = Kind(
    "1, as ranks share the data alone and ZeRO-3 shards the weights over them",
    {"const": 1},
    _read_one,
)
_NO_PIPELINE = Kind(
    "1, as DeepSpeed has no pipeline with ZeRO-3, which spreads the layers' weights over all ranks",
    {"const": 1},
    _read_no_pipeline,
)
_NEMO_NAME = Kind(
    "a name of NeMo-AutoModel, or nothing",
    {"type": "string", "pattern": r"^nemo_automodel\."},
    _read_nemo_name,
)
_EVERY_OR_END = Kind(
    "an integer ≥ 1, or end",
    {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "end"}]},
    _read_every_or_end,
)
_AUTO_OR_COUNT = Kind(
    "auto, or an integer ≥ 1",
    {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]},
    _read_auto_or_count,
)
_OF_TASK = {
    "task": {"type": "string"},
    "data": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1},
}
_TASKS = Kind(
    "a list such as [{task: hellaswag, data: rows.jsonl, limit: 200}]",
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": _OF_TASK,
            "required": ["task", "data"],
            "additionalProperties": False,
        },
    },
    _read_tasks,
    keeps_text=True,
)
#: Annotations of the kinds that a plain type cannot express.
MaxNorm = Annotated[float, _MAX_NORM]
OnlyOne = Annotated[int, _ONE]
NoPipe = Annotated[int, _NO_PIPELINE]
Every = Annotated[int | str, _EVERY]
EveryOrEnd = Annotated[int | str, _EVERY_OR_END]
AutoOrCount = Annotated[int | str, _AUTO_OR_COUNT]
Tasks = Annotated[list, _TASKS]
NemoName = Annotated[str, _NEMO_NAME]


def strip_none(annotation: Any) -> Any:
    """Return `X` of an annotation `X | None`, and any other annotation unchanged."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    (only,) = [part for part in typing.get_args(annotation) if part is not type(None)]
    return only


def kind_of(annotation: Any) -> Kind:
    """Return the kind of an annotation.

    Raises:
        KeyError: no kind has this annotation.
    """
    if typing.get_origin(annotation) is Annotated:
        return next(part for part in annotation.__metadata__ if isinstance(part, Kind))
    if typing.get_origin(annotation) is Literal:
        return _make_choice(typing.get_args(annotation))
    return _KINDS[typing.get_origin(annotation) or annotation]


@dataclass(frozen=True)
class ComponentRules:
    """The rules of a `_target_` section.

    Args:
        calls: dotted name of the callable if the section has no `_target_`.
        may_call: prefixes of the names that the section may call.
        given: arguments that ds_kd passes itself.
        flags: keys of the section that ds_kd takes, true or false.
        words: keys of the section that ds_kd takes, with the words that each may be.
        kwargs: the arguments if the section is absent; None leaves the component out.
        required: whether the section must be there.
        may_be_named: whether the section may hold several components by name.
        has_names: whether `name` may choose one of the project's own, and a list of sections, each
            with a `weight`, is a weighted sum of them.
        example: an example of the section, for messages.
    """

    calls: str = ""
    may_call: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kwargs: Mapping[str, Any] | None = None
    required: bool = False
    may_be_named: bool = False
    has_names: bool = False
    example: str = ""


@dataclass(frozen=True)
class Key:
    """A key of the schema.

    Args:
        name: the last part of the key.
        sentence: its documentation.
        unit: the unit of its number.
        annotation: its type, without None.
        default: its value if the YAML does not set it; {} for a section that is always there.
        bounds: inclusive `low` and `high`, and exclusive `above`.
        component: the rules of a `_target_` section.
    """

    name: str
    sentence: str
    unit: str
    annotation: Any
    default: Any
    bounds: Mapping[str, float]
    component: ComponentRules | None

    @property
    def section(self) -> Any:
        """Return the dataclass of a section's own keys, or None."""
        is_section = dataclasses.is_dataclass(self.annotation) and self.component is None
        return self.annotation if is_section else None

    @property
    def kind(self) -> Kind:
        return kind_of(self.annotation)

    @property
    def expected(self) -> str:
        """Return a description of the values that the key takes, for messages."""
        low, high = self.bounds.get("low"), self.bounds.get("high")
        if low is not None and high is not None:
            return f"{self.kind.words} from {low} to {high}"
        signs = (("low", "≥"), ("above", ">"), ("high", "≤"))
        told = [f"{sign} {self.bounds[name]}" for name, sign in signs if name in self.bounds]
        return f"{self.kind.words} {' and '.join(told)}".strip()

    def read(self, value: Any) -> Any:
        """Return the value in the key's own type.

        Raises:
            ValueError: the value is of another kind or out of bounds; the text is a hint.
        """
        made = self.kind.read(value)
        if not self.bounds:
            return made
        in_range = self.bounds.get("low", made) <= made <= self.bounds.get("high", made)
        if not in_range or made <= self.bounds.get("above", -math.inf):
            raise ValueError
        return made


def key(
    default: Any,
    sentence: str,
    /,
    unit: str = "",
    component: ComponentRules | None = None,
    **bounds: float,
) -> Any:
    """Return a documented dataclass field; a type as the default is called for each config."""
    meta = {"sentence": sentence, "unit": unit, "component": component, "bounds": bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@functools.cache
def keys_of(cls: Any) -> dict[str, Key]:
    """Return the keys of a section by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: Key(
            name=f.name,
            annotation=strip_none(hints[f.name]),
            default=_find_default(f),
            **f.metadata,
        )
        for f in dataclasses.fields(cls)
        if f.metadata
    }


def _find_default(of: Any) -> Any:
    if of.default is not dataclasses.MISSING:
        return of.default
    return [] if of.default_factory is list else {}
