"""Read a YAML file and overrides into plain values, and note the place of each key in the file.

A file that is too large, deep nesting, and anchors or interpolations that multiply are refused
before they are expanded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.names import UNREAD
from ds_kd.config.text.interpolation import (
    MOST,
    TOO_MANY,
    check_interpolations,
    references,
)
from ds_kd.config.text.origins import Origins, mark_variables, variables_in
from ds_kd.config.text.secrets import BLANK, blank_secrets, is_secret, is_secret_flag, remember
from ds_kd.errors import first_line
from ds_kd.files import NotPlainFileError, read_plain_file

_MAX_BYTES, _MAX_NODES, _MAX_DEPTH = 1 << 16, 20_000, 50
_AROUND = 100  # columns shown on both sides of a key in a long line
_STRING = "tag:yaml.org,2002:str"
_KEY = r"[A-Za-z_]\w*(\[\d{1,5}\])*(\.[A-Za-z_]\w*(\[\d{1,5}\])*)*"  # a[0] is a list's entry
_PLAIN_REFERENCE = re.compile(r"\$\{[\w.:]+\}")


@dataclass
class Source:
    """The places of a config's keys in its file.

    Args:
        path: the YAML, as it was given.
        lines: its lines.
        places: key → (line, column, width), from 1.
        overridden: keys that the command line set.
        hidden: row → the (start, end) columns of secrets, from 0; they are not shown.
    """

    path: str = ""
    lines: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)
    hidden: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def locate(self, line: str) -> str:
        """Return a problem with its key's place in front, and the line with a caret under it; that
        of a command's option has none."""
        if line.startswith("--"):
            return line
        match = re.match(r"[\w.\[\]-]+", line)
        key = match[0] if match else ""
        while key:
            if any(f"{key}.".startswith(f"{name}.") for name in self.overridden):
                return f"command line: {line}"
            if key in self.places:
                row, column, width = self.places[key]
                first, last = max(0, column - _AROUND), column + width + _AROUND  # of a long line
                before = self._show_columns(row, first, column - 1)
                after = self._show_columns(row, column - 1, last)
                text, caret = before + after, " " * len(before) + "^" * width
                return f"{self.path}:{row}:{column}: {line}\n{text}\n{caret}"
            if any(name.startswith(f"{key}.") for name in self.overridden):
                return f"command line: {line}"
            key = key.rpartition(".")[0]
        return f"{self.path}: {line}" if self.path else line

    def hide(self, node: Any) -> None:
        """Keep a scalar of the YAML out of excerpts and of other libraries' error messages."""
        remember(node.value)
        first, last = node.start_mark, node.end_mark
        for row in range(first.line, last.line + 1):
            start = first.column if row == first.line else 0
            end = last.column if row == last.line else _MAX_BYTES
            self.hidden.setdefault(row + 1, []).append((start, end))

    def _show_columns(self, row: int, start: int, end: int) -> str:
        """Return columns `start` to `end` of a row, from 0, with secrets blanked."""
        line, parts = self.lines[row - 1], []
        end = min(end, len(line))
        for first, last in sorted(self.hidden.get(row, ())):
            if first < end and last > start:
                parts += [line[start:first], BLANK]
                start = min(last, end)
        return str(blank_secrets("".join([*parts, line[start:end]])))

    @contextmanager
    def add_places(self) -> Iterator[None]:
        """Add to each problem of this block's `ConfigError` its place in the file."""
        try:
            yield
        except ConfigError as error:
            located = ConfigError([self.locate(line) for line in error.problems])
            raise located from error.__cause__  # not from the same text without places


def read(
    path: str | Path | dict[str, Any], overrides: list[str], known: Collection[str] = ()
) -> tuple[dict[str, Any], str, Source]:
    """Read a YAML file, or take a mapping, and put overrides over it.

    Args:
        known: dotted names of keys whose values from variables may be shown.

    Returns:
        The resolved values, the same as YAML with secrets blanked, and their places.

    Raises:
        ConfigError: not readable, not UTF-8, not YAML, keys given twice, or something too large.
    """
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # Errors of the libraries become one sentence each, with the place in the file if they have one.
    source = Source("" if isinstance(path, dict) else str(path))
    try:
        data, shown = _resolve(path, overrides, source, known)
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"]
        ) from None
    except YAMLError as error:
        raise ConfigError([_describe_yaml_error(source.path or "the mapping", error)]) from None
    except RecursionError:
        raise ConfigError(
            [f"{source.path or 'the mapping'}: nested too deeply; {_MAX_DEPTH} levels are allowed"]
        ) from None
    except (OmegaConfBaseException, ValueError) as error:
        line = first_line(error)
        key = getattr(error, "full_key", None)
        if variable := re.search(r"Environment variable '(\w+)' not found", line):
            name = variable[1]
            line = f"the variable {name} is not set; set it, or write ${{oc.env:{name},default}}"
        raise ConfigError([source.locate(f"{key}: {line}" if key else line)]) from None
    return data, shown, source


def _resolve(
    path: str | Path | dict[str, Any],
    overrides: list[str],
    source: Source,
    known: Collection[str],
) -> tuple[dict[str, Any], str]:
    """Return the values of a YAML, and the same as YAML with secrets blanked; fill `source`."""
    from omegaconf import OmegaConf
    from yaml import safe_dump

    if isinstance(path, dict):
        # Through YAML text, so that `1e-8`, which yaml.safe_load reads as text, is a number again.
        text = safe_dump(path, sort_keys=False)
        _outline(text, Source("the mapping"))
    else:
        text = _read_text(Path(path))
        source.lines = text.splitlines()
        _outline(text, source)
    raw = OmegaConf.create(text)
    for override in overrides:
        source.overridden.add(_override(raw, override))
    for name in UNREAD & set(raw):  # their references may lead nowhere
        raw[name] = None if raw._get_node(name)._is_none() else {}

    # Interpolations are checked before OmegaConf follows them, and tell which values are secret.
    plain = OmegaConf.to_container(raw, resolve=False)
    check_interpolations(plain)
    data: Any = OmegaConf.to_container(raw, resolve=True)
    origins = Origins(plain, known)
    origins.remember(data, plain)
    shown = OmegaConf.to_yaml(OmegaConf.create(origins.blank(data, plain)))
    return mark_variables(data, plain, plain), shown


def _read_text(path: Path) -> str:
    try:
        content = read_plain_file(path, _MAX_BYTES)
    except NotPlainFileError as error:
        raise ConfigError(
            [f"{path}: {error}; a config is a regular file of a few KiB of YAML"]
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            [f"{path}:{row}: byte {error.start} is not UTF-8; save the file as UTF-8"]
        ) from None


def _describe_yaml_error(path: str | Path, error: Any) -> str:
    """Return a YAML error in one line, with its place."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    hint = (
        "; indent with spaces"
        if "\\t" in what
        else _hint_at_braces(str(mark and mark.get_snippet()))
    )
    return f"{where}: not valid YAML: {what}{hint}"


def _hint_at_braces(text: str) -> str:
    return "; inside {…} or […] put ${…} in quotes" if "${" in text else ""


def _outline(text: str, source: Source) -> None:
    """Note the places of keys; refuse a text that is too large or too deep, repeats a key, or is no
    mapping."""
    import yaml

    class Shallow(yaml.SafeLoader):
        """A loader that stops at the first level too deep; PyYAML needs seconds for thousands."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise RecursionError
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    # Counted before the text is parsed, as parsing is what would take long.
    if text.count("${") > MOST:
        raise ConfigError([f"{source.path}: {TOO_MANY}"])
    root = yaml.compose(text, Loader=Shallow)
    if not isinstance(root, yaml.MappingNode):
        given = "an empty file" if root is None else f"a {root.id}"
        raise ConfigError([f"{source.path}: got {given}, expected a mapping of sections"])
    if _count_nodes(root) > _MAX_NODES:
        raise ConfigError(
            [f"{source.path}: more than {_MAX_NODES} values, anchors counted where they are used"]
        )
    _note_places(root, source)


def _count_nodes(root: Any) -> int:
    """Count the nodes of a tree, each alias as often as it is used.

    Raises:
        RecursionError: too deep.
    """
    import yaml

    # Counted by node, as the uses of aliases may multiply without bound.
    sizes: dict[int, int] = {}

    def size(node: Any, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise RecursionError
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_NODES + 1  # what an anchor inside itself finds
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            replaced = node.value.count("${") if isinstance(node, yaml.ScalarNode) else 0
            sizes[id(node)] = (
                1
                + replaced * (_MAX_NODES // MOST)
                + sum(size(child, depth + 1) for child in children)
            )
        return sizes[id(node)]

    return size(root, 0)


def _note_places(root: Any, source: Source) -> None:
    """Note the place of each key; refuse keys that are no words or are given twice."""
    import yaml

    twice: list[str] = []

    def walk(node: Any, prefix: str, is_hidden: bool = False) -> None:
        if isinstance(node, yaml.ScalarNode):
            is_hidden = is_hidden or any(map(is_secret, variables_in(node.value)))
            references(node.value, prefix[:-1])  # before OmegaConf reads them
            if is_hidden and not _PLAIN_REFERENCE.fullmatch(node.value):
                source.hide(node)
        if isinstance(node, yaml.SequenceNode):
            flags = [None, *(child.value for child in node.value)]
            for k, child in enumerate(node.value):
                walk(child, f"{prefix[:-1]}[{k}].", is_hidden or is_secret_flag(flags[k]))
        if not isinstance(node, yaml.MappingNode):
            return

        # PyYAML would silently keep the last of two equal keys.
        seen: dict[str, int] = {}
        for name, value in node.value:
            row, column = name.start_mark.line + 1, name.start_mark.column + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError([f"{source.path}:{row}:{column}: a key must be a word"])
            if name.tag.endswith(":merge"):
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    walk(merged, prefix, is_hidden)
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
            walk(value, f"{path}.", is_hidden or is_secret(name.value))

    walk(root, "")
    if twice:
        raise ConfigError(twice)


def _override(raw: Any, override: str) -> str:
    """Apply one override `a.b.c=value`, and return its key."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    name, equals, value = override.partition("=")
    name = name.replace("-", "_")  # as options are written: --step_scheduler.max-steps
    if not equals or not re.fullmatch(_KEY, name):
        raise ConfigError([problem("override", name, "key.sub=value")])
    if name.count(".") >= _MAX_DEPTH:
        raise ConfigError([problem("override", name, f"a key of at most {_MAX_DEPTH} parts")])

    # The value passes the same checks as a file, under a key of its own.
    try:
        text = f"value: {value}"
        _outline(text, Source(f"override {name}"))
        made: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if set(made) != {"value"}:
            raise ConfigError([f"override {name}: expected one value, without a line break"])
        _set_value(raw, name, made["value"])
    except ConfigError as error:  # its key is no other than the override's
        raise ConfigError([re.sub(r"^value\b", name, line) for line in error.problems]) from None
    except YAMLError as error:
        what = getattr(error, "problem", None) or "not one value of YAML"
        raise ConfigError(
            [f"override {name}: not valid YAML: {what}{_hint_at_braces(value)}"]
        ) from None
    return name


def _set_value(raw: Any, name: str, value: Any) -> None:
    """Set the value at a dotted key, through mappings and the entries that lists have.

    Raises:
        ConfigError: a plain value stands on the way there, or a list without such an entry.
    """
    from omegaconf import OmegaConf

    there: Any = OmegaConf.to_container(raw, resolve=False)
    way = [*re.finditer(r"[A-Za-z_]\w*|\[\d+\]", name)]
    for k, part in enumerate(way):
        step, key = part[0], name[: part.start()].rstrip(".")
        if step.startswith("["):
            if not isinstance(there, list):
                raise ConfigError([f"{name}: {key} is no list; write {key}=[…]"])
            if (number := int(step[1:-1])) >= len(there):
                what = f"ends with {key}[{len(there) - 1}]" if there else "is empty"
                raise ConfigError([f"{name}: {key} {what}; write {key}=[…] anew"])
            there = there[number]
            continue

        # Absent sections are made on the way, but no place in a list.
        if there is None and not any(more[0].startswith("[") for more in way[k:]):
            break
        if there is not None and not isinstance(there, dict):
            what, fresh = "a plain value", f"write {key}=… anew"
            if isinstance(there, list):
                what, fresh = "a list", f"write {key}[0].{step} for its first entry"
            raise ConfigError([f"{name}: {key} is {what} and has no keys; {fresh}"])
        there = None if there is None else there.get(step)
    OmegaConf.update(raw, name, value, merge=False)


def quote_yaml(text: str) -> str:
    """Return a text in quotes, so that YAML reads it as a text whatever it holds."""
    return json.dumps(text, ensure_ascii=False)
