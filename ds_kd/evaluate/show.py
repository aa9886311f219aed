"""Render a sample as text, with its supervised tokens marked."""

from __future__ import annotations

import itertools
from typing import Any

from ds_kd.data.labels import IGNORE_INDEX

_COLOUR = "\033[1;32m", "\033[0m"
_BRACKETS = "[[", "]]"


def render(sample: dict[str, Any], tokenizer: Any, colour: bool) -> str:
    """Return the text of a sample, its supervised tokens marked.

    Args:
        sample: with `input_ids` and shifted `labels`.
        tokenizer: of the student.
        colour: mark them by colour, for a terminal, instead of by brackets.
    """
    ids, labels = _unshift(sample)
    taught = [label != IGNORE_INDEX for label in labels]
    before, after = _COLOUR if colour else _BRACKETS
    text, end, shown = "", 0, ""
    for is_taught, run in itertools.groupby(taught):
        end += len([*run])
        # A token's text can depend on those before it: the whole is decoded, and cut.
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        part, text = whole[len(text) :], whole
        shown += f"{before}{part}{after}" if is_taught else part
    count = sum(taught)
    return f"--- sample {sample['sample_id']}: {len(ids)} tokens, {count} supervised\n{shown}"


def _unshift(sample: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens of a sample and a label for each, as a shifted label is the next token's.

    A segment also gets the token of its last label, which is no input of any position.
    """
    ids: list[int] = []
    labels: list[int] = []
    start, total = 0, sample.get("num_tokens", len(sample["input_ids"]))
    for length in sample.get("segment_lengths", [total]):
        inputs = sample["input_ids"][start : start + length]
        following = sample["labels"][start : start + length]
        last = following[-1:] if following[-1:] != [IGNORE_INDEX] else []
        ids += [*inputs, *last]
        labels += ([IGNORE_INDEX, *following])[: len(inputs) + len(last)] if inputs else []
        start += length
    return ids, labels
