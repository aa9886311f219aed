"""Read the arguments of a function or class from its source file, without importing it."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_kd.config.names import DIVERGENCES, LOSSES, NAMED, home_of

_HOPS = 4  # longest chain of `from .other import name` that is followed


@dataclass(frozen=True)
class Signature:
    """The arguments of a callable.

    Args:
        annotations: argument → its annotation as text, empty where there is none.
        required: arguments without a default.
        is_open: whether it takes other arguments too.
        decorators: names of the functions that decorate it.
        defaults: argument → its default as text.
        sentences: argument → its text in the docstring.
        limits: (argument, low, high) for each number of a divergence that must lie between these,
            ends excluded; None is no limit.
    """

    annotations: dict[str, str]
    required: tuple[str, ...]
    is_open: bool
    decorators: tuple[str, ...] = ()
    defaults: dict[str, str] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    limits: tuple[tuple[str, float, float | None], ...] = ()


@functools.cache
def signature_of(dotted: str) -> Signature | None:
    """Return the signature of a dotted name, or None if its source cannot be read."""
    module, _, name = home_of(dotted).rpartition(".")
    for _ in range(_HOPS):
        path = _file_of(module)
        if path is None:
            return None
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError):
            return None

        # The name is defined in this file, or imported from the file that is looked at next.
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _read_class(node, module)
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return _read_signature(node, 0, node)
        hop = _import_of(tree, name, module, path.name == "__init__.py")
        if hop is None:
            return None
        module, name = hop
    return None


@functools.cache
def divergences_by_name() -> dict[str, str]:
    """Return the project's divergences, `name` → dotted name: the classes of
    `losses/divergences.py` and of the files in `losses/named/` that have a `name`."""
    home, folder = _file_of(DIVERGENCES.rstrip(".")), _file_of(NAMED.rstrip("."))
    assert home is not None and folder is not None
    files = {LOSSES: home}
    files |= {f"{NAMED}{path.stem}.": path for path in sorted(folder.parent.glob("*.py"))}
    return {
        name: f"{prefix}{node.name}"
        for prefix, path in files.items()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and (name := _read_literal(node, "name"))
    }


def explain_absence(dotted: str) -> str:
    """Return why a name will not be found, or an empty text if it is there, or may be: in a module
    without a source file, or put there as the module runs."""
    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        path, name = _file_of(".".join(parts[:split])), parts[split]
        if path is None:
            continue
        try:
            names = _find_names(ast.parse(path.read_text("utf-8")))
        except SyntaxError as error:
            return f"{path}, line {error.lineno}: {error.msg}"
        except (OSError, ValueError):
            return ""
        is_module = path.name == "__init__.py" and _holds_module(path.parent, name)
        if is_module or names & {name, "*", "__getattr__"}:
            return ""
        near = difflib.get_close_matches(name, names, n=1)
        return f"{path} has no {name}" + (f"; did you mean {near[0]}?" if near else "")

    # No module of the name has a source file; a directory of others still has a place.
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return f"there is no module {parts[0]}; is PYTHONPATH set?"
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not places or any(_holds_module(place, parts[1]) for place in places):
        return ""
    return f"{places[0]} has no {parts[1]}; is PYTHONPATH set?"


def _holds_module(directory: Path, name: str) -> bool:
    """Return whether a directory holds a package or a module, compiled ones too."""
    return (directory / name).is_dir() or any(directory.glob(f"{name}.*"))


def _find_names(tree: ast.Module) -> set[str]:
    """Return every name that some line of a module defines, imports or assigns."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _file_of(module: str) -> Path | None:
    """Return the file of a module as importlib would find it, without importing its parents."""
    if not module:  # of a name without a dot
        return None
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is not None and not rest and spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(root, *rest)
        for found in (path / "__init__.py", path.with_suffix(".py")):
            if found.is_file():
                return found
    return None


def _import_of(tree: ast.Module, name: str, module: str, is_package: bool) -> tuple | None:
    """Return the (module, name) from which a module imports a name, or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")
                    up = node.level - (1 if is_package else 0)
                    base = parts[: len(parts) - up] if node.level else []
                    return ".".join([*base, *filter(None, [node.module])]), alias.name
    return None


def _find_decorators(node: ast.FunctionDef | ast.ClassDef) -> tuple[str, ...]:
    """Return the names of the decorators that a definition calls with arguments."""
    called = (each.func for each in node.decorator_list if isinstance(each, ast.Call))
    return tuple(ast.unparse(function).rpartition(".")[2] for function in called)


def _read_class(node: ast.ClassDef, module: str) -> Signature | None:
    """Return the signature of a class; arguments that its `__init__` hands on as `**others` to that
    of its base are the base's."""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    init = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
    if init is None:
        return signature_of(f"{module}.{bases[0]}") if bases else None
    own = _read_signature(init, 1, node)
    if own is None:
        return None

    # Without the base's arguments a misspelt one would be taken for one that is handed on.
    own = replace(own, limits=_read_literal(node, "limits") or ())
    base = signature_of(f"{module}.{bases[0]}") if bases and _hands_on(init) else None
    if base is None:
        return own
    return replace(
        own,
        annotations={**own.annotations, **base.annotations},
        required=(*own.required, *base.required),
        is_open=base.is_open,
        defaults={**base.defaults, **own.defaults},
        sentences={**base.sentences, **own.sentences},
        limits=(*base.limits, *own.limits),
    )


def _hands_on(init: ast.stmt) -> bool:
    """Return whether an `__init__` with `**others` calls `super().__init__(**others)`."""
    assert isinstance(init, ast.FunctionDef)
    if init.args.kwarg is None:
        return False
    wanted = f"super().__init__(**{init.args.kwarg.arg})"
    return any(isinstance(n, ast.Call) and ast.unparse(n) == wanted for n in ast.walk(init))


def _read_literal(node: ast.ClassDef, name: str) -> Any:
    """Return the literal that a class assigns to a name, or None."""
    for each in node.body:
        if isinstance(each, ast.Assign) and [ast.unparse(to) for to in each.targets] == [name]:
            try:
                return ast.literal_eval(each.value)
            except ValueError:
                return None
    return None


def _read_signature(
    node: ast.stmt, skip: int, definition: ast.FunctionDef | ast.ClassDef
) -> Signature | None:
    """Return the signature of a function, without its first `skip` arguments.

    Args:
        definition: the function, or its class; has the decorators and the docstring.
    """
    if not isinstance(node, ast.FunctionDef):
        return None
    positional = [*node.args.posonlyargs, *node.args.args]
    optional = positional[len(positional) - len(node.args.defaults) :]
    given: list[ast.expr | None] = [*node.args.defaults, *node.args.kw_defaults]
    pairs = zip([*optional, *node.args.kwonlyargs], given, strict=True)
    defaults = {a.arg: ast.unparse(default) for a, default in pairs if default is not None}
    arguments = [*positional[skip:], *node.args.kwonlyargs]
    texts = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in arguments}

    # The sentences are for `--list-keys`.
    return Signature(
        texts,
        tuple(name for name in texts if name not in defaults),
        node.args.kwarg is not None,
        _find_decorators(definition),
        defaults,
        _read_sentences(ast.get_docstring(definition) or ""),
    )


def _read_sentences(docstring: str) -> dict[str, str]:
    """Return the texts on arguments in the section `Args:` of a docstring."""
    _, _, section = docstring.partition("\nArgs:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.partition("\n\n")[0].splitlines():
        entry = re.fullmatch(r" {4}([\w, ]+): (.*)", line)
        names = entry[1].split(", ") if entry else names
        text = entry[2] if entry else line.strip()
        for name in names:
            found[name] = f"{found[name]} {text}" if name in found and not entry else text
    return found
