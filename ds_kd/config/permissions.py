"""The dotted names that a config may call: a closed list, and those that the user permits.

A `_target_` names code that will run. The user permits more names on the command line, and `load`
marks them once, in the config's own values: each becomes a `Permitted`. Later code needs no list. A
name whose mark is lost on the way is refused.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from ds_kd.config.names import ALIASES, ALLOWED, UNSUPPORTED


class Permitted(str):
    """A name that the command line permits (`--allow-targets`); only `mark_permitted` makes one."""


def mark_permitted(tree: Any, allow: tuple[str, ...], key: str = "") -> Any:
    """Return a copy of a YAML's values in which the names that the user permits are `Permitted`.

    Args:
        allow: prefixes of the names of code, and whole names of models whose authors' code may run.
        key: the key that holds `tree`.
    """
    if isinstance(tree, dict):
        return {name: mark_permitted(value, allow, str(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        return [mark_permitted(value, allow) for value in tree]
    if not isinstance(tree, str):
        return tree
    if key == "_target_" or key.endswith("_fn"):
        name = translate(tree)
        is_permitted = name in allow or name.startswith(tuple(f"{p.rstrip('.')}." for p in allow))
    else:
        is_permitted = key == "pretrained_model_name_or_path" and tree in allow
    return Permitted(tree) if is_permitted else tree


def translate(dotted: str) -> str:
    """Return ds_kd's name for a name of NeMo-AutoModel, and any other name unchanged."""
    ours = ALIASES.get(dotted, dotted)
    return Permitted(ours) if isinstance(dotted, Permitted) else ours


def refuse(dotted: str) -> str:
    """Return why this name may not be used, or an empty text; imports nothing."""
    name = translate(dotted)
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", name):
        whole = next((known for known in ALLOWED if known.endswith(f".{dotted}")), "")
        hint = f"; did you mean {whole}?" if whole else ""
        return f"{dotted!r} is not a dotted public name{hint}"
    if name in UNSUPPORTED:
        return f"{dotted}: {UNSUPPORTED[name]}"

    # In ds_kd only losses and data are open: a function of `ds_kd.config` could call anything.
    is_ours = name.startswith(("ds_kd.losses.", "ds_kd.data."))
    if is_ours or name in ALLOWED or isinstance(dotted, Permitted):
        return ""

    # A refusal says what to type next: a name that was meant, or the option that permits this one.
    if name.startswith("nemo_automodel."):
        return f"{dotted} has no counterpart in ds_kd; known: {', '.join(ALIASES)}"
    known = {known.lower(): known for known in [*ALIASES, *ALLOWED]}
    near = [known[key]] if (key := dotted.lower()) in known else []
    near = near or difflib.get_close_matches(dotted, [*ALLOWED, *ALIASES], n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"if you trust it, add --allow-targets {dotted.rpartition('.')[0]}"
    )
    return f"{dotted!r} is not among the names a config may call; {hint}"
