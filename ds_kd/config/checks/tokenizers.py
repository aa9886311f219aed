"""Compare the tokenizers of two model directories by their tokenizer.json, and look for the chat
template that a data set needs."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from ds_kd.config.components import Component, problem
from ds_kd.files import NotPlainFileError, read_plain_file

_MAX_BYTES = 100_000_000  # those of 256 thousand tokens have about 35 MB


def find_other_tokenizer(student: Component, teacher: Component, is_needed: bool) -> str | None:
    """Return the problem of a teacher whose tokenizer gives ids other tokens than the student's, or
    None.

    The run compares all that the tokenizers hold. Here a token that only one of them has is passed
    over, as another file of its model may add it, and so is a model without a tokenizer.json here.

    Args:
        is_needed: the teacher is trained under; else only validation uses it.
    """
    paths = _path_of(student), _path_of(teacher)
    if paths[0] is None or paths[1] is None:
        return None
    contents = [_read(path) for path in paths if path is not None]
    if contents[0] == contents[1]:  # the usual case, and cheap
        return None
    ours, theirs = map(_vocabulary_in, contents)
    first = _find_first_difference(ours, theirs) if ours and theirs else None
    if first is None:
        return None

    # The words are those of `models.causal_lm.common_vocab_size`, which needs torch.
    names = [component.kwargs["pretrained_model_name_or_path"] for component in (student, teacher)]
    expected = "a teacher with the student's tokenizer"
    expected += "" if is_needed else ", or step_scheduler.validate_teacher: false"
    hint = (
        f"the student's tokenizer ({names[0]}, {len(ours)} tokens) and the teacher's ({names[1]}, "
        f"{len(theirs)} tokens) differ: token {first!r} is {ours.get(first, 'absent')} for the "
        f"student and {theirs.get(first, 'absent')} for the teacher. Distillation compares the "
        f"models token by token: choose a student and a teacher of one family."
    )
    return problem("teacher_model", names[1], expected, hint)


_NEED_TEMPLATE = (".ChatDataset", ".make_sharegpt_dataset")
#: Names under which transformers finds a template beside the model.
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def find_missing_template(
    student: Component, training: Component | None, held_out: list[Component]
) -> str | None:
    """Return the problem of conversations for which there is no chat template, or None.

    Args:
        training: the data set of training, if it is right; a template that it names is also that
            of the others.
        held_out: the data sets of validation.
    """
    name, given = student.kwargs.get("pretrained_model_name_or_path"), student.kwargs
    path, first = _path_of(student), _list_parts(training) if training else []
    is_named = any(part.get("chat_template") for _, part in first)
    others = [] if is_named else [_list_parts(each) for each in held_out]
    asking = [
        key
        for key, part in itertools.chain(first, *others)
        if str(part.get("_target_")).endswith(_NEED_TEMPLATE) and not part.get("chat_template")
    ]
    if path is None or not asking:
        return None

    # The other places are the tokenizer's own settings.
    settings = _read(path.with_name("tokenizer_config.json"))
    is_there = re.search(rb'"chat_template"\s*:\s*["\[{]', settings) or given.get("chat_template")
    if is_there or any(path.with_name(file).exists() for file in _TEMPLATES):
        return None
    return (
        f"{asking[0]}.chat_template: missing, as the tokenizer of {name} has no chat template; "
        f"give a Jinja file or text"
    )


def _list_parts(dataset: Component) -> list[tuple[str, dict[str, Any]]]:
    """Return (key, section) of a data set and of the sources that it mixes."""
    sources = dataset.kwargs.get("sources")
    inner = sources if isinstance(sources, list) else []
    whole = (dataset.key, {"_target_": dataset.name, **dataset.kwargs})
    parts = ((f"{dataset.key}.sources[{k}]", p) for k, p in enumerate(inner))
    return [whole, *((key, part) for key, part in parts if isinstance(part, dict))]


def _path_of(component: Component) -> Path | None:
    """Return the tokenizer.json of a local model, or None."""
    name, given = component.kwargs.get("pretrained_model_name_or_path"), component.kwargs
    if not isinstance(name, str) or given.get("gguf_file") is not None:
        return None
    path = Path(name, str(given.get("subfolder") or ""), "tokenizer.json")
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return None


def _read(path: Path) -> bytes:
    try:
        return read_plain_file(path, _MAX_BYTES)
    except (OSError, NotPlainFileError):
        return b""


def _vocabulary_in(content: bytes) -> dict[str, int]:
    """Return token → id, added tokens included; nothing where the file has another form."""
    try:
        tree = _parse(content)
        vocabulary = tree["model"]["vocab"]
        if isinstance(vocabulary, list):  # of pairs of a token and its score
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
        return {**vocabulary, **added}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return {}


def _parse(content: bytes) -> Any:
    """Return the tree of a tokenizer.json, where possible without the merges, which the tokenizers
    library writes last and which take most of the time."""
    if merges := re.search(rb',\s*"merges"\s*:\s*\[', content):
        with contextlib.suppress(ValueError):
            tree = json.loads(content[: merges.start()] + b"}}")
            if "added_tokens" in tree and "vocab" in tree["model"]:
                return tree
    return json.loads(content)


def _find_first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    """Return the token of the lowest id that is not the same in both; None where every difference
    is a token that only one of them has, at an id that the other does not use."""
    by_id = {number: token for token, number in theirs.items()}
    if all(theirs.get(t, n) == n and by_id.get(n, t) == t for t, n in ours.items()):
        return None
    above = max(*ours.values(), *theirs.values()) + 1
    differing = (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    return min(differing, key=lambda t: (min(ours.get(t, above), theirs.get(t, above)), t))
