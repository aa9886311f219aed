"""A YAML file and overrides → plain values, and where in the file each key stands.

What would hurt (a file too large, anchors or interpolations that multiply, deep nesting) is refused
before it is expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_kd.errors import first_line
from ds_kd.targets import ConfigError, is_secret, problem, without_secrets

_MAX_BYTES, _MAX_NODES, _MAX_DEPTH, _MAX_LENGTH = 1 << 16, 20_000, 50, 1_000_000
_STRING = "tag:yaml.org,2002:str"
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_RESOLVERS = ("oc.env", "oc.decode")


@dataclass
class Source:
    """Where a config's keys stand.

    Args:
        path: the YAML, as it was given.
        lines: its lines.
        places: key → (line, column, width), from 1.
        overridden: keys that the command line set.
    """

    path: str = ""
    lines: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)

    def locate(self, line: str) -> str:
        """A problem with the place of its key in front, and the line with a caret under it."""
        match = re.match(r"[\w.\[\]-]+", line)
        key = match[0] if match else ""
        while key:
            if any(f"{key}.".startswith(f"{name}.") for name in self.overridden):
                return f"command line: {line}"
            if key in self.places:
                row, column, width = self.places[key]
                before, after = self.lines[row - 1][: column - 1], self.lines[row - 1][column - 1 :]
                before, after = without_secrets(before), without_secrets(after)
                text, caret = before + after, " " * len(before) + "^" * width
                return f"{self.path}:{row}:{column}: {line}\n{text}\n{caret}"
            if any(name.startswith(f"{key}.") for name in self.overridden):
                return f"command line: {line}"
            key = key.rpartition(".")[0]
        return f"{self.path}: {line}" if self.path else line

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Give the `ConfigError` of this block its places."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError([self.locate(line) for line in error.problems]) from error


def read(path: str | Path, overrides: list[str]) -> tuple[dict[str, Any], str, Source]:
    """Read a YAML file and put overrides over it.

    Returns:
        The resolved values, the same as YAML with secrets blanked, and where they stand.

    Raises:
        ConfigError: not readable, not UTF-8, not YAML, keys given twice, or something too large.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    source = Source(str(path))
    try:
        text = _text(Path(path))
        source.lines = text.splitlines()
        _outline(text, source)
        raw = OmegaConf.create(text)
        for override in overrides:
            source.overridden.add(_override(raw, override))
        plain = OmegaConf.to_container(raw, resolve=False)
        _check_interpolations(plain)
        data: Any = OmegaConf.to_container(raw, resolve=True)
        shown = OmegaConf.to_yaml(OmegaConf.create(_blanked(data, plain)))
        data = _marked(data, plain, plain)
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"]
        ) from None
    except YAMLError as error:
        raise ConfigError([_told(path, error)]) from None
    except RecursionError:
        raise ConfigError([f"{path}: nested too deeply; {_MAX_DEPTH} levels are allowed"]) from None
    except (OmegaConfBaseException, ValueError) as error:
        line = first_line(error)
        key = getattr(error, "full_key", None)
        if variable := re.search(r"Environment variable '(\w+)' not found", line):
            name = variable[1]
            line = f"the variable {name} is not set; set it, or write ${{oc.env:{name},default}}"
        raise ConfigError([source.locate(f"{key}: {line}" if key else line)]) from None
    return data, shown, source


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            [f"{path}: larger than {_MAX_BYTES // 1024} KiB; a config is a few KiB of YAML"]
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            [f"{path}:{row}: byte {error.start} is not UTF-8; save the file as UTF-8"]
        ) from None


def _told(path: str | Path, error: Any) -> str:
    """A YAML error in one line, with its place."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    hint = "; indent with spaces" if "\\t" in what else _hint(str(mark and mark.get_snippet()))
    return f"{where}: not valid YAML: {what}{hint}"


def _hint(text: str) -> str:
    return "; inside {…} or […] put ${…} in quotes" if "${" in text else ""


def _outline(text: str, source: Source) -> None:
    """Note where keys stand; refuse what is too large, too deep, a key twice, or no mapping."""
    import yaml

    class Shallow(yaml.SafeLoader):
        """Stops at the first level too deep: PyYAML takes seconds over thousands of them."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise RecursionError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    root = yaml.compose(text, Loader=Shallow)
    if not isinstance(root, yaml.MappingNode):
        given = "an empty file" if root is None else f"a {root.id}"
        raise ConfigError([f"{source.path}: got {given}, expected a mapping of sections"])
    if _size(root) > _MAX_NODES:
        raise ConfigError(
            [f"{source.path}: more than {_MAX_NODES} values, anchors counted where they are used"]
        )
    _note_places(root, source)


def _size(root: Any) -> int:
    """Nodes of a tree, aliases counted as often as they stand there.

    Raises:
        RecursionError: too deep.
    """
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise RecursionError
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_NODES + 1  # what an anchor inside itself finds
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        return sizes[id(node)]

    return size(root, 0)


def _note_places(root: Any, source: Source) -> None:
    """Where each key stands; refuses keys that are no words or stand there twice."""
    import yaml

    twice: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for k, child in enumerate(node.value):
                walk(child, f"{prefix[:-1]}[{k}].")
        if not isinstance(node, yaml.MappingNode):
            return
        seen: dict[str, int] = {}
        for name, value in node.value:
            row, column = name.start_mark.line + 1, name.start_mark.column + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError([f"{source.path}:{row}:{column}: a key must be a word"])
            if name.tag.endswith(":merge"):
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    walk(merged, prefix)
                continue
            if name.tag != _STRING:
                raise ConfigError(
                    [f"{source.path}:{row}:{column}: the key {name.value} is no word to YAML; "
                     f"put it in quotes"]
                )  # fmt: skip
            path = f"{prefix}{name.value}"
            if name.value in seen:
                twice.append(
                    f"{source.path}:{row}:{column}: {path}: given twice, first in line "
                    f"{seen[name.value]}; keep one"
                )
            seen[name.value] = row
            source.places[path] = (row, column, max(1, len(name.value)))
            walk(value, f"{path}.")

    walk(root, "")
    if twice:
        raise ConfigError(twice)


def _override(raw: Any, override: str) -> str:
    """Set what `a.b.c=value` says, and return its key."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    name, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError([problem("override", name, "key.sub=value")])
    try:
        text = f"value: {value}"
        _outline(text, Source(f"override {name}"))
        made: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if set(made) != {"value"}:
            raise ConfigError([f"override {name}: expected one value, without a line break"])
        OmegaConf.update(raw, name, made["value"], merge=False)
    except YAMLError as error:
        what = getattr(error, "problem", None) or "not one value of YAML"
        raise ConfigError([f"override {name}: not valid YAML: {what}{_hint(value)}"]) from None
    return name


def _check_interpolations(tree: Any) -> None:
    """Refuse resolvers that are not needed, and references that multiply each other.

    Raises:
        ConfigError: names the key.
    """
    lengths: dict[str, int] = {}

    def length(value: Any, key: str) -> int:
        if isinstance(value, dict):
            return 1 + sum(length(v, f"{key}.{n}" if key else str(n)) for n, v in value.items())
        if isinstance(value, list):
            return 1 + sum(length(v, f"{key}.{k}") for k, v in enumerate(value))
        if not isinstance(value, str) or "${" not in value:
            return len(value) if isinstance(value, str) else 1
        if key not in lengths:
            lengths[key] = _MAX_LENGTH + 1  # what a reference to itself finds
            lengths[key] = len(value) + sum(
                length(_find(tree, name), name) for name in _references(value, key)
            )
            if lengths[key] > _MAX_LENGTH:
                raise ConfigError([f"{key}: its ${{…}} refer to itself or grow beyond all bounds"])
        return lengths[key]

    length(tree, "")


def _find(tree: Any, path: str) -> Any:
    """What stands at a dotted key; None where there is none."""
    for part in path.split("."):
        if isinstance(tree, list) and part.isdigit():
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _references(value: str, key: str) -> list[str]:
    """The keys that the `${…}` of a text refer to."""
    names = []
    while match := _INNERMOST.search(value):
        inner = match[1].strip()
        resolver, colon, _ = inner.partition(":")
        if colon and resolver not in _RESOLVERS:
            raise ConfigError(
                [f"{key}: ${{{resolver}:…}} is not known here; write ${{section.key}} or "
                 f"${{oc.env:VAR,default}}"]
            )  # fmt: skip
        if not colon:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", inner):
                raise ConfigError(
                    [problem(key, f"${{{inner}}}", "${section.key}, the whole key written out")]
                )
            names.append(inner)
        value = value[: match.start()] + "\0" + value[match.end() :]
    return names


class FromEnvironment(str):
    """A text that a variable gave; where a number is wanted it is one, see `decoded`."""


def _marked(tree: Any, plain: Any, root: Any) -> Any:
    """The same tree with what came from variables marked, through references too."""
    if isinstance(tree, dict):
        inner = plain if isinstance(plain, dict) else {}
        return {name: _marked(value, inner.get(name), root) for name, value in tree.items()}
    if isinstance(tree, list):
        texts = plain if isinstance(plain, list) else [None] * len(tree)
        return [_marked(value, text, root) for value, text in zip(tree, texts, strict=True)]
    if not isinstance(tree, str):
        return tree
    while isinstance(plain, str) and (name := re.fullmatch(r"\$\{([\w.]+)\}", plain)):
        plain = _find(root, name[1])
    is_variable = isinstance(plain, str) and plain.startswith("${oc.env:")
    return FromEnvironment(tree) if is_variable else tree


def decoded(value: Any) -> Any:
    """The numbers and truth values that variables' texts stand for; anything else as it is."""
    if isinstance(value, dict):
        return {name: decoded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [decoded(inner) for inner in value]
    if not isinstance(value, FromEnvironment):
        return value
    from omegaconf import OmegaConf

    if not re.fullmatch(r"[\w.+-]+", value):
        return str(value)
    made = OmegaConf.create(f"value: {value}").value
    return made if isinstance(made, (int, float, bool)) else str(value)


def _blanked(tree: Any, plain: Any, name: str = "") -> Any:
    """The same tree without tokens, keys and passwords: it goes into logs and checkpoints.

    Args:
        plain: the tree before interpolation, which tells what came from a secret variable.
    """
    if isinstance(tree, dict):
        inner = plain if isinstance(plain, dict) else {}
        return {n: _blanked(v, inner.get(n), str(n)) for n, v in tree.items()}
    if isinstance(tree, list):
        texts = plain if isinstance(plain, list) else [None] * len(tree)
        return [_blanked(v, text, name) for v, text in zip(tree, texts, strict=True)]
    variables = re.findall(r"oc\.env:\s*(\w+)", plain) if isinstance(plain, str) else []
    if tree and isinstance(tree, str) and any(is_secret(n) for n in (name, *variables)):
        return "***"
    return without_secrets(tree)
