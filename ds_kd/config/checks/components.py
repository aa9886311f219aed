"""The `_target_` sections of a config: names, arguments, models and data, judged without importing
anything they call."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import Any

from ds_kd.config.checks.data import check_data, declared
from ds_kd.config.checks.files import check_model
from ds_kd.config.components import (
    Component,
    ConfigError,
    is_opened,
    problem,
    refuse,
    wrong_arguments,
)
from ds_kd.config.keys import ComponentRules, Key
from ds_kd.config.names import ALIASES, DIVERGENCES, LOSSES, MODEL, NOT_WITH_ZERO, home_of
from ds_kd.config.signatures import divergences, signature_of
from ds_kd.config.text.origins import decoded
from ds_kd.data.mixture import check_weights, data_set_of
from ds_kd.data.rows.declaration import DataSet
from ds_kd.errors import first_line


def check_components(
    value: Any, key: Key, allow: tuple[str, ...], config_only: bool, problems: list[str]
) -> dict[str, Component]:
    """Return the components of a section that may hold several, by name; the name of a single one
    is empty.

    Args:
        value, key, allow, config_only, problems: as for `check_component`.
    """
    has_names = isinstance(value, dict) and "_target_" not in value
    if not (has_names and any(isinstance(inner, dict) for inner in value.values())):
        single = check_component(value, key, allow, config_only, problems)
        return {} if single is None else {"": single}
    found = {}
    for name, inner in value.items():
        if not re.fullmatch(r"\w+", str(name)):
            expected = "a name of letters, digits and _, which metrics carry"
            problems.append(problem(key.name, name, expected))
        elif inner is not None:
            part = replace(key, name=f"{key.name}.{name}")
            found[str(name)] = check_component(inner, part, allow, config_only, problems)
    return {name: component for name, component in found.items() if component is not None}


def check_component(
    value: Any, key: Key, allow: tuple[str, ...], config_only: bool, problems: list[str]
) -> Component | None:
    """Return the component of a `_target_` section, after noting all that is wrong with it.

    Args:
        value: what the YAML holds there.
        key: the section's, with its rules.
        allow: prefixes of `_target_` names opened on the command line.
        config_only: models need nothing but a config.json.
        problems: takes a line for each thing that is wrong.
    """
    rules, path = key.component, key.name
    assert rules is not None
    example = rules.example.format(name=path)
    if value is None:
        if rules.required:
            problems.append(f"{path}: missing; write for example {example}")
        return None if rules.kwargs is None else Component(rules.calls, dict(rules.kwargs), path)
    is_model = rules.calls == MODEL
    if not isinstance(value, dict):
        first = "pretrained_model_name_or_path" if is_model else "_target_"
        problems.append(problem(path, value, f"a mapping such as {{{first}: …}}"))
        return None
    dotted = value.get("_target_", rules.calls or None)
    if not isinstance(dotted, str):
        hint = f"for example {example}" if example else ""
        problems.append(problem(f"{path}._target_", dotted, "a dotted name", hint))
        return None

    refusal = refuse(dotted, allow)
    if refusal:
        problems.append(f"{path}._target_: {refusal}")
    name = ALIASES.get(dotted, dotted)
    declaration = None if refusal else _declared(path, name, allow, problems)
    component = Component(name, _kwargs_of(value), path, allow, declaration)
    written = _take_synonym(path, declaration, component.kwargs, problems)
    for name, inner in component.kwargs.items():
        if name not in rules.given and not (is_model and name in NOT_WITH_ZERO):  # told below
            problems += _argument(component, name, inner, name in rules.flags)
    if refusal:
        return component
    may_call = home_of(component.name).startswith(rules.may_call or rules.calls)
    if not may_call and not is_opened(component.name, allow):
        problems.append(problem(f"{path}._target_", dotted, _callable(rules)))
    elif is_model:
        _model(component, problems, config_only)
    else:
        problems += _own_words(component, rules)
        problems += _signature(component, rules)
        problems += _rows(component, written)
    return component


def _callable(rules: ComponentRules) -> str:
    """Return which names a section may call, for messages."""
    if rules.may_call == (DIVERGENCES,):
        return " or ".join(divergences())
    if not rules.may_call or rules.may_call[0].startswith(LOSSES):
        return rules.calls
    return f"a name that begins with {' or '.join(rules.may_call)}"


def _kwargs_of(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section's arguments in their own types."""
    kwargs = {name: decoded(value) for name, value in section.items() if name != "_target_"}
    if isinstance(kwargs.get("betas"), list):  # torch takes no integer for one of two floats
        kwargs["betas"] = [float(b) if isinstance(b, int) else b for b in kwargs["betas"]]
    return kwargs


def _own_words(component: Component, rules: ComponentRules) -> list[str]:
    """Return what is wrong with the keys of a section that ds_kd takes itself."""
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


def _signature(component: Component, rules: ComponentRules) -> list[str]:
    """Return what is wrong with a component's arguments by its callable's signature."""
    signature = signature_of(component.name)
    if signature is None:
        is_ours = component.name.startswith("ds_kd.")
        return [f"{component.key}._target_: there is no {component.name}"] if is_ours else []
    also = (*rules.flags, *rules.words)
    found = wrong_arguments(component, signature.annotations, signature.is_open, rules.given, also)
    missing = [name for name in signature.required if name not in (*component.kwargs, *rules.given)]
    return found + [
        f"{component.key}.{name}: missing; {component.name} needs it" for name in missing
    ]


def _rows(component: Component, written: str) -> list[str]:
    """Return what is wrong with the rows of a data set that declares them."""
    data = component.declaration
    if data is None:
        return []
    if data.has_parts:
        return _parts(component, data.source)
    return [*filter(None, [check_data(component.key, data, component.kwargs, written)])]


def _parts(component: Component, source: str) -> list[str]:
    """Check the parts of a mixture as sections of their own, and translate their names."""
    key, parts = f"{component.key}.{source}", component.kwargs.get(source)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) for p in parts):
        return [problem(key, parts, "a list of mappings such as {dataset_name: …}")]
    problems: list[str] = []
    made = []
    for number, given in enumerate(parts):
        part, name = {**given}, given.get("_target_")
        if name is not None:
            part["_target_"] = ALIASES.get(str(name), name)
        weight = part.pop("weight", None)
        try:
            part["_target_"] = data_set_of(part).name
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{key}[{number}]: {first_line(error)}")
            continue
        rules = ComponentRules(may_call=("ds_kd.data.",), given=("tokenizer",))
        section = Key(f"{key}[{number}]", "", "", Component, None, {}, rules)
        found = check_component(part, section, component.allow, False, problems)
        if found is not None:
            made.append({"_target_": found.name, **found.kwargs})
            made[-1] |= {"weight": weight} if weight is not None else {}
    try:
        check_weights(made)
    except ValueError as error:
        problems.append(f"{key}: {error}")
    component.kwargs[source] = made
    return problems


def _declared(
    path: str, dotted: str, allow: tuple[str, ...], problems: list[str]
) -> DataSet | None:
    """Return what a data set declares of itself, after noting where that cannot be had."""
    try:
        return declared(dotted, allow)
    except ConfigError as error:
        problems += [f"{path}._target_: {line}" for line in error.problems]
        return None


def _take_synonym(
    path: str, data: DataSet | None, kwargs: dict[str, Any], problems: list[str]
) -> str:
    """Put `dataset_name` under the name that the data set has for its source, and return which of
    the two is written."""
    own = data.source if data is not None else "dataset_name"
    if own == "dataset_name" or "dataset_name" not in kwargs:
        return own
    if own in kwargs:
        problems.append(f"{path}: dataset_name and {own} are both given; keep one")
    kwargs.setdefault(own, kwargs.pop("dataset_name"))
    return "dataset_name"


def _argument(component: Component, name: str, value: Any, is_flag: bool) -> list[str]:
    """Return what is wrong with an argument whatever is called with it."""
    path, problems = f"{component.key}.{name}", []
    if name.endswith("_fn") and value is not None:
        return _function(path, value, component.allow)
    if isinstance(value, dict) and "_target_" in value:
        problems.append(f"{path}: a _target_ inside a _target_ is not called; give plain values")
    if is_flag and not isinstance(value, bool):
        problems.append(problem(path, value, "true or false"))
    return problems


def _function(path: str, name: Any, allow: tuple[str, ...]) -> list[str]:
    """Return what is wrong with the dotted name of a function."""
    if not isinstance(name, str):
        return [problem(path, name, "a dotted name")]
    if refused := refuse(name, allow):
        return [f"{path}: {refused}"]
    dotted = ALIASES.get(name, name)
    if dotted.startswith("ds_kd.") and signature_of(dotted) is None:
        return [f"{path}: there is no {dotted}"]
    return []


def _model(component: Component, problems: list[str], config_only: bool) -> None:
    """Add what is wrong with the arguments of `from_pretrained` to `problems`."""
    path, kwargs = component.key, component.kwargs
    name = kwargs.get("pretrained_model_name_or_path")
    if wrong := check_model(path, kwargs, config_only):
        problems.append(wrong)
    for given in set(kwargs) - _MODEL_KEYS:
        near = difflib.get_close_matches(given, [*_MODEL_KEYS], n=1, cutoff=0.8)
        if near:
            problems.append(f"{path}.{given}: unknown key; did you mean {path}.{near[0]}?")
    problems += [f"{path}.{n}: {NOT_WITH_ZERO[n]}" for n in kwargs if n in NOT_WITH_ZERO]
    for spelling in ("torch_dtype", "dtype"):
        dtype = str(kwargs.get(spelling, "auto")).removeprefix("torch.")
        if dtype not in ("bf16", "bfloat16", "fp32", "float32", "auto"):
            problems.append(
                problem(
                    f"{path}.{spelling}",
                    kwargs[spelling],
                    "bf16, fp32 or auto",
                    f"write {spelling}: bf16",
                )
            )
    attention = kwargs.get("attn_implementation")
    is_kernel = isinstance(attention, dict) or "/" in str(attention)  # of the hub
    if attention is not None and not is_kernel and attention not in _ATTENTION:
        problems.append(problem(f"{path}.attn_implementation", attention, " or ".join(_ATTENTION)))
    if kwargs.get("trust_remote_code") and name not in component.allow:
        problems.append(
            f"{path}.trust_remote_code: runs code of the model's author; add --allow-targets "
            f"{name} to permit it"
        )


_ATTENTION = (
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "flex_attention",
)  # fmt: skip
#: Of from_pretrained, to find misspellings; it takes others, which models then judge.
_MODEL_KEYS = {
    "pretrained_model_name_or_path",
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "revision",
    "cache_dir",
    "gguf_file",
    "subfolder",
    "token",
    "use_safetensors",
}
