"""Mark the values that come from environment variables, and blank those that are secret."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ds_kd.config.text.interpolation import comes_from_secret, comes_from_variable, find
from ds_kd.config.text.secrets import BLANK, blank_secrets, is_secret, remember

#: The last part of a key that names files, models or data.
_PLACE = re.compile(
    r"(?:^|[._])(?:path|paths|dir|directory|file|files|dataset|dataset_id|dataset_name|dtype|split|"
    r"revision|_target_|attn_implementation)$"
)
#: A short number or a boolean.
_NUMBER = re.compile(r"[+-]?\d{1,5}|[+-]?\d*\.\d+|[+-]?[\d.]+e[+-]?\d+|true|false", re.IGNORECASE)
_LONGEST_WORD = 10


class FromEnvironment(str):
    """A text that came from an environment variable; `decode` makes a number of it if it is one."""


def mark_variables(tree: Any, plain: Any, root: Any) -> Any:
    """Return the tree with each text that came from a variable as `FromEnvironment`.

    Args:
        plain: the tree before interpolation.
        root: the whole config before interpolation, which references refer to.
    """
    plain = _follow_reference(plain, root)
    if isinstance(tree, dict):
        return {n: mark_variables(value, _step_into(plain, n), root) for n, value in tree.items()}
    if isinstance(tree, list):
        return [mark_variables(value, _step_into(plain, k), root) for k, value in enumerate(tree)]
    is_variable = isinstance(plain, str) and plain.startswith("${oc.env:")
    return FromEnvironment(tree) if is_variable and isinstance(tree, str) else tree


def _follow_reference(plain: Any, root: Any) -> Any:
    """Return the value that a text of the form `${section.key}` refers to, or the value itself."""
    while isinstance(plain, str) and (name := re.fullmatch(r"\$\{([\w.]+)\}", plain)):
        plain = find(root, name[1])
    return plain


def _step_into(plain: Any, name: Any) -> Any:
    if isinstance(plain, dict):
        return plain.get(name)
    return plain[name] if isinstance(plain, list) and isinstance(name, int) else None


def decode(value: Any) -> Any:
    """Return the number or boolean that a variable's text stands for, else the value itself."""
    if isinstance(value, dict):
        return {name: decode(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    if not isinstance(value, FromEnvironment):
        return value
    from omegaconf import OmegaConf

    if not re.fullmatch(r"[\w.+-]+", value):
        return str(value)
    made = OmegaConf.create(f"value: {value}").value
    return made if isinstance(made, (int, float, bool)) else str(value)


def variables_in(plain: Any) -> list[str]:
    """Return the names of the environment variables that a text refers to."""
    return re.findall(r"oc\.env:\s*(\w+)", plain) if isinstance(plain, str) else []


@dataclass(frozen=True)
class Origins:
    """The origins of a config's values, which tell what came from a secret or a variable and is not
    shown.

    Args:
        root: the whole config before interpolation.
        known: dotted names of the schema's own keys; what they mean is known, and it is no secret.
    """

    root: Any
    known: Collection[str] = ()

    def remember(self, tree: Any, plain: Any, key: str = "", is_hidden: bool = False) -> None:
        """Remember the values that are not shown, so that they are blanked everywhere.

        Args:
            plain: the tree before interpolation, which tells what came from where.
            key: its dotted name; entries of a list have the list's.
        """
        is_hidden = is_hidden or comes_from_secret(plain, self.root)
        for variable in filter(is_secret, variables_in(plain)):
            remember(os.environ.get(variable))
        if not is_hidden and self._is_unknown(tree, plain, key):
            parts = [tree, *map(os.environ.get, variables_in(plain))]
            for part in parts:
                if part and not _is_harmless(part):
                    remember(part)
        plain = _follow_reference(plain, self.root)
        for value, inner, name in _entries(tree, plain, key):
            self.remember(value, inner, name, is_hidden or is_secret(name.rpartition(".")[2]))
        if is_hidden and not isinstance(tree, (dict, list)):
            remember(tree)

    def blank(self, tree: Any, plain: Any, key: str = "", is_hidden: bool = False) -> Any:
        """Return the tree with what is not shown blanked, for logs and checkpoints. The arguments
        are those of `remember`."""
        is_hidden = is_hidden or comes_from_secret(plain, self.root)
        if is_hidden and tree and not isinstance(tree, bool):
            return BLANK  # with its keys, where it is a mapping
        if tree and self._is_unknown(tree, plain, key):
            # Runs are compared by this text. So short a digest tells nobody a password.
            digest = hashlib.sha256(f"{key}={tree}".encode(errors="replace")).hexdigest()
            return f"{BLANK} {digest[:4]}"
        plain = _follow_reference(plain, self.root)
        shown = [
            self.blank(value, inner, name, is_hidden or is_secret(name.rpartition(".")[2]))
            for value, inner, name in _entries(tree, plain, key)
        ]
        if isinstance(tree, dict):
            return dict(zip(tree, shown, strict=True))
        return list(blank_secrets(shown)) if isinstance(tree, list) else blank_secrets(tree)

    def _is_unknown(self, value: Any, plain: Any, key: str) -> bool:
        """Return whether a text came from a variable, and neither its key nor its form tells what
        it is: a password may stand in a variable of any name."""
        if not isinstance(value, str) or key in self.known:
            return False
        is_told = _PLACE.search(key) or _NUMBER.fullmatch(value) or _is_path(value)
        return not is_told and comes_from_variable(plain, self.root)


def _entries(tree: Any, plain: Any, key: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield the values of a mapping or list, each before interpolation too, and their keys."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield value, _step_into(plain, name), f"{key}.{name}" if key else str(name)
    elif isinstance(tree, list):
        for k, value in enumerate(tree):
            yield value, _step_into(plain, k), key


def _is_path(text: str) -> bool:
    """Return whether a text is a path whose first directory is there: a secret may begin with `/`
    too."""
    if text.startswith(("~/", "./", "../")):
        return True
    first = re.match(r"/[^/]+/", text)
    return first is not None and os.path.isdir(first[0])


def _is_harmless(text: str) -> bool:
    """Return whether a text would blank harmless words and numbers of every message."""
    is_word = len(text) <= _LONGEST_WORD and text.isalpha() and text.islower()
    return is_word or text.isdigit() or _is_path(text) or _NUMBER.fullmatch(text) is not None
