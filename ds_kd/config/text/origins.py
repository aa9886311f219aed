"""Mark the values that come from environment variables, and blank those that are secret."""

from __future__ import annotations

import os
import re
from typing import Any

from ds_kd.config.text.interpolation import comes_from_secret, find
from ds_kd.config.text.secrets import BLANK, blank_secrets, is_secret, remember


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


def remember_secrets(tree: Any, plain: Any, root: Any, is_hidden: bool = False) -> None:
    """Remember the values of secret keys and variables, so that they are blanked everywhere.

    Args:
        plain: the tree before interpolation, which tells what came from a secret.
    """
    is_hidden = is_hidden or comes_from_secret(plain, root)
    for variable in filter(is_secret, variables_in(plain)):
        remember(os.environ.get(variable))
    plain = _follow_reference(plain, root)
    if isinstance(tree, dict):
        for name, value in tree.items():
            remember_secrets(
                value, _step_into(plain, name), root, is_hidden or is_secret(str(name))
            )
    elif isinstance(tree, list):
        for k, value in enumerate(tree):
            remember_secrets(value, _step_into(plain, k), root, is_hidden)
    elif is_hidden:
        remember(tree)


def blank_tree(tree: Any, plain: Any, root: Any, is_hidden: bool = False) -> Any:
    """Return the tree with tokens, keys and passwords blanked, for logs and checkpoints.

    Args:
        plain: the tree before interpolation, which tells what came from a secret.
    """
    is_hidden = is_hidden or comes_from_secret(plain, root)
    if is_hidden and tree and not isinstance(tree, bool):
        return BLANK  # with its keys, where it is a mapping
    plain = _follow_reference(plain, root)
    if isinstance(tree, dict):
        return {
            n: blank_tree(v, _step_into(plain, n), root, is_hidden or is_secret(str(n)))
            for n, v in tree.items()
        }
    if isinstance(tree, list):
        shown = [blank_tree(v, _step_into(plain, k), root, is_hidden) for k, v in enumerate(tree)]
        return list(blank_secrets(shown))
    return blank_secrets(tree)
