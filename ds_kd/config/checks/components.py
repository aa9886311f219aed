"""The `_target_` sections of a config: names, arguments, models and data, judged without importing
anything they call."""

from __future__ import annotations

import difflib
from typing import Any

from ds_kd.config.checks.data import check_data, declared
from ds_kd.config.checks.files import check_model
from ds_kd.config.components import ConfigError, Target, problem, refuse, wrong_arguments
from ds_kd.config.names import ALIASES, NOT_WITH_ZERO
from ds_kd.config.origins import decoded
from ds_kd.config.schema import MODEL
from ds_kd.config.signatures import signature_of
from ds_kd.data.mixture import check_weights, data_set_of
from ds_kd.data.rows.declaration import DataSet
from ds_kd.errors import first_line


def check_target(
    value: Any, path: str, meta: Any, allow: tuple[str, ...], problems: list[str]
) -> Target | None:
    """The `Target` of a section, after noting in `problems` all that is wrong with it.

    Args:
        value: what the YAML holds there.
        path: its key.
        meta: of the schema; with `config_only` where models need nothing but a config.json.
        allow: prefixes of `_target_` names opened on the command line.
    """
    if value is None:
        if meta.get("required"):
            problems.append(f"{path}: missing; {meta['doc']}, for example {meta['example']}")
        return Target(meta["target"], dict(meta["default"]), path) if "default" in meta else None
    if not isinstance(value, dict):
        first = "pretrained_model_name_or_path" if meta.get("target") == MODEL else "_target_"
        problems.append(problem(path, value, f"a mapping such as {{{first}: …}}"))
        return None
    kwargs = {name: decoded(inner) for name, inner in value.items() if name != "_target_"}
    if isinstance(kwargs.get("betas"), list):  # torch takes no integer for one of two floats
        kwargs["betas"] = [float(b) if isinstance(b, int) else b for b in kwargs["betas"]]
    dotted = value.get("_target_", meta.get("target"))
    if not isinstance(dotted, str):
        hint = f"for example {meta['example']}" if "example" in meta else ""
        problems.append(problem(f"{path}._target_", dotted, "a dotted name", hint))
        return None
    refusal = refuse(dotted, allow)
    if refusal:
        problems.append(f"{path}._target_: {refusal}")
    declaration = None if refusal else _declared(path, ALIASES.get(dotted, dotted), allow, problems)
    written = _take_synonym(path, declaration, kwargs, problems)
    for name, inner in kwargs.items():
        if name in meta.get("given", ()):  # told below, once
            continue
        problems += _argument(f"{path}.{name}", inner, name in meta.get("flags", ()), allow)
    target = Target(ALIASES.get(dotted, dotted), kwargs, path, declaration)
    if meta.get("target") == MODEL:
        if target.target != MODEL and not refusal and not allow:
            problems.append(problem(f"{path}._target_", dotted, MODEL))
        _model(path, kwargs, allow, problems, meta.get("config_only", False))
        return target
    for name, among in meta.get("words", {}).items():
        if name in kwargs and kwargs[name] not in among:
            problems.append(problem(f"{path}.{name}", kwargs[name], " or ".join(among)))
    if target.target.startswith("ds_kd.data.") and kwargs.pop("labels", "") == "unshifted":
        problems.append(f"{path}.labels: {target.target} shifts its labels itself; remove it")
    kind = meta.get("calls", ())
    if not refusal and not target.target.startswith(kind or "") and not allow:
        problems.append(
            problem(f"{path}._target_", dotted, f"a name that begins with {' or '.join(kind)}")
        )
        return target
    if not refusal:
        problems += _signature(target, meta)
    if declaration is not None and declaration.has_parts:
        _parts(f"{path}.{declaration.source}", kwargs, declaration.source, allow, problems)
    elif declaration is not None and (wrong := check_data(path, declaration, kwargs, written)):
        problems.append(wrong)
    return target


def _signature(target: Target, meta: Any) -> list[str]:
    """Return what is wrong with a component's arguments by its callable's signature."""
    signature = signature_of(target.target)
    if signature is None:
        is_ours = target.target.startswith("ds_kd.")
        return [f"{target.key}._target_: there is no {target.target}"] if is_ours else []
    given, also = meta.get("given", ()), (*meta.get("flags", ()), *meta.get("words", ()))
    found = wrong_arguments(target, signature.annotations, signature.is_open, given, also)
    missing = [name for name in signature.required if name not in (*target.kwargs, *given)]
    return found + [f"{target.key}.{name}: missing; {target.target} needs it" for name in missing]


def _parts(
    key: str, kwargs: dict[str, Any], source: str, allow: tuple[str, ...], problems: list[str]
) -> None:
    """Check the parts of a mixture as sections of their own, and translate their names."""
    parts = kwargs.get(source)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) for p in parts):
        problems.append(problem(key, parts, "a list of mappings such as {dataset_name: …}"))
        return
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
        meta = {"given": ("tokenizer",), "calls": ("ds_kd.data.",)}
        target = check_target(part, f"{key}[{number}]", meta, allow, problems)
        if target is not None:
            made.append({"_target_": target.target, **target.kwargs})
            made[-1] |= {"weight": weight} if weight is not None else {}
    try:
        check_weights(made)
    except ValueError as error:
        problems.append(f"{key}: {error}")
    kwargs[source] = made


def _declared(
    path: str, dotted: str, allow: tuple[str, ...], problems: list[str]
) -> DataSet | None:
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


def _argument(path: str, value: Any, is_flag: bool, allow: tuple[str, ...]) -> list[str]:
    """What is wrong with an argument whatever is called with it."""
    problems = []
    if path.endswith("_fn") and value is not None:
        return _function(path, value, allow)
    if isinstance(value, dict) and "_target_" in value:
        problems.append(f"{path}: a _target_ inside a _target_ is not called; give plain values")
    if is_flag and not isinstance(value, bool):
        problems.append(problem(path, value, "true or false"))
    return problems


def _function(path: str, name: Any, allow: tuple[str, ...]) -> list[str]:
    """What is wrong with the dotted name of a function."""
    if not isinstance(name, str):
        return [problem(path, name, "a dotted name")]
    if refused := refuse(name, allow):
        return [f"{path}: {refused}"]
    dotted = ALIASES.get(name, name)
    if dotted.startswith("ds_kd.") and signature_of(dotted) is None:
        return [f"{path}: there is no {dotted}"]
    return []


def _model(
    path: str, kwargs: dict, allow: tuple[str, ...], problems: list[str], config_only: bool
) -> None:
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
    if kwargs.get("trust_remote_code") and name not in allow:
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
