"""Labels: the value that marks unsupervised positions, the shift, and a count of empty samples."""

from __future__ import annotations

from typing import Any

IGNORE_INDEX = -100  # label of positions that are not supervised, as in Hugging Face and torch
IS_PROMPT = "is_prompt"  # the key of a sample without an answer, all of whose tokens are the prompt
_MOST = 1000  # samples that are inspected if each has to be made
_NAMED = 5  # samples named in the message
_TOLERATED = 0.01  # share of samples without a supervised token; above it the message is a warning


def check_ignore_index(value: int) -> None:
    """Refuse an `ignore_index` other than the one that data sets write.

    Raises:
        ValueError: names the right one.
    """
    if value != IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be {IGNORE_INDEX}, got {value}: data sets mark what is not "
            f"supervised with {IGNORE_INDEX}, and tokens are counted by it"
        )


def shift(ids: list[int], mask: list[bool], seq_length: int | None = None) -> dict[str, list[int]]:
    """Return a sample with shifted labels: position `i` predicts `ids[i+1]` if `mask[i+1]`.

    The mask is by position, never by token id, so that EOS is learnt even if it also pads.

    Args:
        ids: tokens of one sample.
        mask: whether each of them is supervised.
        seq_length: cut to this many positions; None keeps all.
    """
    labels = [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]
    return {"input_ids": ids[:-1][:seq_length], "labels": labels[1:][:seq_length]}


def describe_unsupervised(dataset: Any) -> str:
    """Return a sentence on the samples without a supervised token, or an empty text.

    Args:
        dataset: samples with `labels`. Those of a `datasets.Dataset` are all counted, of another
            one a thousand, spread over it.

    Raises:
        ValueError: no sample has a supervised token.
    """
    looked_at, empty = _find_unsupervised(dataset)
    if not empty:
        return ""
    if len(empty) == looked_at:
        raise ValueError(
            f"none of the {looked_at} samples looked at has a supervised token; see them with "
            "--show-samples 3, and mind seq_length with truncation"
        )
    share = len(empty) / looked_at
    names = ", ".join(empty[:_NAMED]) + (", …" if len(empty) > _NAMED else "")
    of = f"{looked_at} looked at" if looked_at < len(dataset) else f"{looked_at}"
    told = f"{len(empty)} of {of} samples ({share:.1%}) have no supervised token: {names}"
    if share <= _TOLERATED:
        return told
    return f"warning: {told}; they cost their time and teach nothing (--show-samples shows them)"


def _find_unsupervised(dataset: Any) -> tuple[int, list[str]]:
    """Return the number of samples inspected, and the ids of those without a supervised token."""
    if hasattr(dataset, "with_format"):
        counts = _count_supervised(dataset)
        empty = [k for k, count in enumerate(counts) if not count]
        names = dataset.select(empty)["sample_id"] if empty else []
        return len(counts), [str(name) for name in names]
    step = max(1, len(dataset) // _MOST)
    chosen, unsupervised = range(0, len(dataset), step), list[str]()
    for k in chosen:
        sample = dataset[k]
        if all(label == IGNORE_INDEX for label in sample["labels"]):
            unsupervised.append(str(sample.get("sample_id", k)))
    return len(chosen), unsupervised


def _count_supervised(dataset: Any) -> list[int]:
    """Count the supervised tokens of each sample of a `datasets.Dataset`, without making lists."""
    import numpy as np
    import pyarrow.compute as pc

    counts: list[int] = []
    for chunk in dataset.with_format("arrow")["labels"][:].chunks:
        taught = np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False) != IGNORE_INDEX)
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
        upto = np.concatenate([[0], taught])[ends]
        counts += np.diff(upto, prepend=0).tolist()
    return counts
