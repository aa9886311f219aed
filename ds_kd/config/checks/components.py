"""Check the `_target_` sections of a config: names, arguments, models and data. Nothing that they
call is imported."""

from __future__ import annotations

import difflib
import math
import re
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from ds_kd.config.checks.data import check_data, find_declaration
from ds_kd.config.checks.files import check_model
from ds_kd.config.components import (
    Component,
    ConfigError,
    find_wrong_arguments,
    problem,
)
from ds_kd.config.keys import ComponentRules, Key, is_number
from ds_kd.config.names import LOSSES, MODEL, NOT_WITH_ZERO, home_of
from ds_kd.config.permissions import Permitted, refuse, translate
from ds_kd.config.sections import Teacher
from ds_kd.config.signatures import (
    Signature,
    divergences_by_name,
    explain_absence,
    signature_of,
)
from ds_kd.config.text.origins import decode
from ds_kd.data.mixture import check_weights, data_set_of
from ds_kd.data.rows.declaration import DataSet
from ds_kd.errors import first_line


def check_components(
    value: Any, key: Key, config_only: bool, problems: list[str]
) -> dict[str, Component]:
    """Return the components of a section that may hold several, by name; the name of a single one
    is empty.

    Args:
        value, key, config_only, problems: as for `check_component`.
    """
    has_names = isinstance(value, dict) and "_target_" not in value
    if not (has_names and any(isinstance(inner, dict) for inner in value.values())):
        single = check_component(value, key, config_only, problems)
        return {} if single is None else {"": single}
    found = {}
    for name, inner in value.items():
        if not re.fullmatch(r"\w+", str(name)):
            expected = "a name of letters, digits and _, which metrics carry"
            problems.append(problem(key.name, name, expected))
        elif inner is not None:
            part = replace(key, name=f"{key.name}.{name}")
            found[str(name)] = check_component(inner, part, config_only, problems)
    return {name: component for name, component in found.items() if component is not None}


def check_component(
    value: Any, key: Key, config_only: bool, problems: list[str]
) -> Component | None:
    """Return the component of a `_target_` section, after adding its problems to `problems`.

    Args:
        value: the YAML's value of the section.
        key: the section's key, with its rules.
        config_only: a model needs only its config.json.
        problems: takes a line for each problem.
    """
    rules, path = key.component, key.name
    assert rules is not None
    if value is None:
        if rules.required:
            example = rules.example.format(name=path)
            problems.append(f"{path}: missing; write for example {example}")
        return None if rules.kwargs is None else Component(rules.calls, dict(rules.kwargs), path)
    dotted = _read_target(value, rules, path, problems)
    if dotted is None:
        return None

    # A refused name still gets its arguments checked, so that all problems are reported together.
    is_model = rules.calls == MODEL
    refusal = refuse(dotted)
    if refusal:
        problems.append(f"{path}._target_: {refusal}")
    name = translate(dotted)
    declaration = None if refusal else _find_declaration(path, name, problems)
    component = Component(name, _kwargs_of(value), path, declaration)
    written = _translate_source(path, declaration, component.kwargs, problems)
    for name, inner in component.kwargs.items():
        if name not in rules.given and not (is_model and name in NOT_WITH_ZERO):  # reported below
            problems += _check_argument(component, name, inner, name in rules.flags)
    if refusal:
        return component

    # Models judge their arguments themselves; all other callables have a signature to compare with.
    may_call = home_of(component.name).startswith(rules.may_call or rules.calls)
    if not may_call and not isinstance(component.name, Permitted):
        problems.append(problem(f"{path}._target_", dotted, _describe_callables(rules)))
    elif is_model:
        _check_model(component, problems, config_only)
    else:
        problems += _check_words(component, rules)
        problems += _check_signature(component, rules)
        problems += _check_rows(component, written)
    return component


def note_on_absent_code(component: Component) -> str:
    """Return a note on code from outside that is not found here, or an empty text.

    It is no problem of the config, as the ranks may have another search path.
    """
    if component.name.startswith("ds_kd.") or not isinstance(component.name, Permitted):
        return ""
    why = explain_absence(component.name)
    return f"{component.key}._target_: {component.name} is not found here: {why}" if why else ""


def _read_target(value: Any, rules: ComponentRules, path: str, problems: list[str]) -> str | None:
    """Return the dotted name that a section calls, or None after adding a problem."""
    if not isinstance(value, dict):
        first = "pretrained_model_name_or_path" if rules.calls == MODEL else "_target_"
        first = "name" if rules.has_names else first
        word = value if rules.has_names and value in [*divergences_by_name()] else "…"
        problems.append(problem(path, value, f"a mapping such as {{{first}: {word}}}"))
        return None
    dotted = value.get("_target_", rules.calls or None)
    if isinstance(dotted, str):
        return dotted
    hint = f"for example {rules.example.format(name=path)}" if rules.example else ""
    if dotted is None and "dataset_name" in value:
        with suppress(OSError, ValueError, RecursionError):  # then the example is the hint
            hint = f"the columns of its rows are read by {data_set_of(value).name}"
    problems.append(problem(f"{path}._target_", dotted, "a dotted name", hint))
    return None


def _describe_callables(rules: ComponentRules) -> str:
    """Return a description of the names that a section may call, for messages."""
    if rules.has_names:
        return f"{rules.calls}, or in its place a name: {', '.join(divergences_by_name())}"
    if not rules.may_call or rules.may_call[0].startswith(LOSSES):
        return rules.calls
    return f"a name that begins with {' or '.join(rules.may_call)}"


def _kwargs_of(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section's arguments in their own types."""
    kwargs = {name: decode(value) for name, value in section.items() if name != "_target_"}
    if isinstance(kwargs.get("betas"), list):  # torch takes no integer for one of two floats
        kwargs["betas"] = [float(b) if isinstance(b, int) else b for b in kwargs["betas"]]
    return kwargs


def _check_words(component: Component, rules: ComponentRules) -> list[str]:
    """Return the problems of the keys of a section that ds_kd takes itself."""
    found = [
        problem(f"{component.key}.{name}", component.kwargs[name], " or ".join(among))
        for name, among in rules.words.items()
        if name in component.kwargs and component.kwargs[name] not in among
    ]
    is_ours = component.name.startswith("ds_kd.data.")
    if is_ours and component.kwargs.pop("labels", "") == "unshifted":
        found.append(
            f"{component.key}.labels: {component.name} shifts its labels itself; remove it"
        )
    return found


def _check_signature(component: Component, rules: ComponentRules) -> list[str]:
    """Return the problems of a component's arguments, compared with its callable's signature."""
    signature = signature_of(component.name)
    if signature is None:
        is_ours = component.name.startswith("ds_kd.")
        return [f"{component.key}._target_: there is no {component.name}"] if is_ours else []
    names = ("dataset_name",) * (component.declaration is not None)  # a synonym of its source
    also = (*rules.flags, *rules.words, *names)
    found = find_wrong_arguments(
        component, signature.annotations, signature.is_open, rules.given, also
    )
    missing = [name for name in signature.required if name not in (*component.kwargs, *rules.given)]

    # A section calls what it names, and a loss would be called without the models' logits.
    if {"student_logits", "labels"} <= {*missing}:
        return [
            f"{component.key}._target_: {component.name} is a loss itself, and a section names "
            "what makes one; name a class, or a function without arguments that returns "
            f"{component.name.rpartition('.')[2]}"
        ]
    data, is_ours = component.declaration, component.name.startswith("ds_kd.data.")
    if data is not None and is_ours and not data.has_parts:  # the name that the documentation uses
        missing = ["dataset_name" if name == data.source else name for name in missing]
    found += [f"{component.key}.{name}: missing; {component.name} needs it" for name in missing]
    return found + _check_limits(component, signature)


def _check_limits(component: Component, signature: Signature) -> list[str]:
    """Return the problems of numbers that do not lie between the limits of their argument."""
    problems = []
    for name, low, high in signature.limits:
        value = component.kwargs.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not (is_number(value) and low < value < (math.inf if high is None else high)):
            ends = f"> {low}" if high is None else f"between {low} and {high}, ends excluded"
            problems.append(problem(f"{component.key}.{name}", value, f"a number {ends}"))
    return problems


def _check_rows(component: Component, written: str) -> list[str]:
    """Return the problems of the rows of a data set that declares them."""
    data = component.declaration
    if data is None:
        return []
    if data.has_parts:
        return _check_parts(component, data.source)
    return [*filter(None, [check_data(component.key, data, component.kwargs, written)])]


def _check_parts(component: Component, source: str) -> list[str]:
    """Check the parts of a mixture as sections of their own, and translate their names."""
    key, parts = f"{component.key}.{source}", component.kwargs.get(source)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) for p in parts):
        return [problem(key, parts, "a list of mappings such as {dataset_name: …}")]

    # Each part is checked as a section of its own, without its weight, which the mixture takes.
    problems: list[str] = []
    made = []
    for number, given in enumerate(parts):
        part, name = {**given}, given.get("_target_")
        if name is not None:
            part["_target_"] = translate(str(name))
        weight = part.pop("weight", None)
        try:
            part["_target_"] = data_set_of(part).name
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{key}[{number}]: {first_line(error)}")
            continue
        words: dict[str, tuple] = {"weight": ()}  # for messages only, as it is taken out above
        rules = ComponentRules(may_call=("ds_kd.data.",), given=("tokenizer",), words=words)
        section = Key(f"{key}[{number}]", "", "", Component, None, {}, rules)
        found = check_component(part, section, False, problems)
        if found is not None:
            made.append({"_target_": found.name, **found.kwargs})
            made[-1] |= {"weight": weight} if weight is not None else {}

    try:
        check_weights(made)
    except ValueError as error:
        problems.append(f"{key}: {error}")
    component.kwargs[source] = made
    return problems


def _find_declaration(path: str, dotted: str, problems: list[str]) -> DataSet | None:
    """Return a data set's declaration, or None; a module that fails to import adds a problem."""
    try:
        return find_declaration(dotted)
    except ConfigError as error:
        problems += [f"{path}._target_: {line}" for line in error.problems]
        return None


def _translate_source(
    path: str, data: DataSet | None, kwargs: dict[str, Any], problems: list[str]
) -> str:
    """Rename `dataset_name` to the data set's own argument for its source, and return the name that
    the YAML uses."""
    own = data.source if data is not None else "dataset_name"
    for name in (own, "dataset_name"):  # null drops a key, as in an override
        if data is not None and kwargs.get(name, "") is None:
            del kwargs[name]
    if own == "dataset_name" or "dataset_name" not in kwargs:
        return own
    if own in kwargs:
        problems.append(f"{path}: dataset_name and {own} are both given; keep one")
    kwargs.setdefault(own, kwargs.pop("dataset_name"))
    return "dataset_name"


def _check_argument(component: Component, name: str, value: Any, is_flag: bool) -> list[str]:
    """Return the problems of an argument that do not depend on the callable."""
    path, problems = f"{component.key}.{name}", []
    if name.endswith("_fn") and value is not None:
        return _check_function(path, value)
    if isinstance(value, dict) and "_target_" in value:
        problems.append(f"{path}: a _target_ inside a _target_ is not called; give plain values")
    if is_flag and not isinstance(value, bool):
        problems.append(problem(path, value, "true or false"))
    return problems


def _check_function(path: str, name: Any) -> list[str]:
    """Return the problems of the dotted name of a function."""
    if not isinstance(name, str):
        return [problem(path, name, "a dotted name")]
    if refused := refuse(name):
        return [f"{path}: {refused}"]
    dotted = translate(name)
    if dotted.startswith("ds_kd.") and signature_of(dotted) is None:
        return [f"{path}: there is no {dotted}"]
    return []


def _check_model(component: Component, problems: list[str], config_only: bool) -> None:
    """Add the problems of the arguments of `from_pretrained` to `problems`."""
    path, kwargs = component.key, component.kwargs
    name = kwargs.get("pretrained_model_name_or_path")
    if wrong := check_model(path, kwargs, config_only):
        problems.append(wrong)

    # from_pretrained takes any argument, so that only near misses of known ones are refused, and
    # keys of the section that says where the teacher comes from.
    of_teacher = {each.name for each in fields(Teacher)}
    for given in sorted({*kwargs} - _MODEL_KEYS):
        if given in of_teacher:
            problems.append(f"{path}.{given}: is no argument of a model; write teacher.{given}")
            continue
        near = difflib.get_close_matches(given, [*_MODEL_KEYS], n=1, cutoff=0.8)
        if near:
            problems.append(f"{path}.{given}: unknown key; did you mean {path}.{near[0]}?")
    problems += [f"{path}.{n}: {NOT_WITH_ZERO[n]}" for n in kwargs if n in NOT_WITH_ZERO]
    for spelling in ("torch_dtype", "dtype"):
        dtype = str(kwargs.get(spelling, "auto")).removeprefix("torch.")
        if dtype not in ("bf16", "bfloat16", "fp32", "float32", "auto"):
            hint = f"write {spelling}: bf16"
            given = kwargs[spelling]
            problems.append(problem(f"{path}.{spelling}", given, "bf16, fp32 or auto", hint))

    if not isinstance(liger := kwargs.get("use_liger_kernel", False), bool):
        problems.append(problem(f"{path}.use_liger_kernel", liger, "true or false"))
    attention = kwargs.get("attn_implementation")
    is_kernel = isinstance(attention, dict) or "/" in str(attention)  # of the hub
    if attention is not None and not is_kernel and attention not in _ATTENTION:
        problems.append(problem(f"{path}.attn_implementation", attention, " or ".join(_ATTENTION)))
    if kwargs.get("trust_remote_code") and not isinstance(name, Permitted):
        problems.append(
            f"{path}.trust_remote_code: runs code of the model's author; add --allow-targets "
            f"{name} to permit it"
        )


_ATTENTION = (
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention",
)  # fmt: skip
#: Arguments of from_pretrained, to find misspellings; others are left to the model to judge.
_MODEL_KEYS = {
    "pretrained_model_name_or_path",
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "use_liger_kernel",
    "trust_remote_code",
    "revision",
    "cache_dir",
    "gguf_file",
    "subfolder",
    "token",
    "use_safetensors",
}
