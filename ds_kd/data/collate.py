"""Collate samples into one micro-batch of tensors."""

from __future__ import annotations

from typing import Any

import torch

from ds_kd.data.labels import IGNORE_INDEX


def default_collater(
    samples: list[dict[str, Any]], pad_seq_len_divisible: int | None = None, pad_token_id: int = 0
) -> dict[str, Any]:
    """Pad on the right, or lay packs end to end, and find the supervised positions.

    No attention mask is made: under a causal mask right padding cannot reach a token, and attention
    without a mask takes the fast causal kernels.

    Args:
        samples: `input_ids`, shifted `labels`; `sample_id`, or `sample_ids` and `segment_lengths`
            of a pack, or all that `SharedDataset` gives; `num_tokens` if some are padding;
            `is_filler` if it is no sample.
        pad_seq_len_divisible: round the padded length up to a multiple of this.
        pad_token_id: the padding token.

    Returns:
        `input_ids`, `labels` `[batch, length]` int64; `supervised` `[N]` int64, flat indices of the
        supervised positions, rising; `supervised_labels` `[N]` int64; `num_labels` N, `num_tokens`
        (without padding), `num_slots` (with it); `sample_ids`. Packs make one row, and give
        `position_ids` `[1, length]`, which restart with every sample, and `segment_lengths`.

        Where samples share a beginning, `_join_labels` says what is there instead of `labels`, and
        `num_shared` tokens are not computed. Positions go on from those of `segment_parents`.
    """
    # A filler keeps this rank's collectives going and counts as nothing.
    real = [sample for sample in samples if not sample.get("is_filler")]
    ids = [i for s in real for i in s.get("sample_ids") or [s.get("sample_id", "")]]
    num_tokens = sum(sample.get("num_tokens", len(sample["input_ids"])) for sample in real)
    packed = any("segment_lengths" in sample for sample in samples)
    rows = [sample["input_ids"] for sample in samples]
    rows = [[token for row in rows for token in row]] if packed else rows
    length = max(1, *map(len, rows))
    if pad_seq_len_divisible:
        length = -(-length // pad_seq_len_divisible) * pad_seq_len_divisible

    # The models' heads are applied at the supervised positions alone.
    input_ids = _pad(rows, length, pad_token_id)
    extra = _make_segments(samples, length) if packed else {}
    if any("segment_parents" in sample for sample in samples):
        extra |= _join_labels(samples)
        extra["num_shared"] = num_tokens - sum(len(sample["input_ids"]) for sample in real)
    else:
        extra |= _find_supervised(samples, length, packed)
    return {
        "input_ids": input_ids,
        "num_tokens": num_tokens,
        "num_slots": input_ids.numel(),
        "sample_ids": [str(i) for i in ids],
        **extra,
    }


def _pad(lists: list[list[int]], length: int, value: int) -> torch.Tensor:
    """Return lists as one int64 tensor `[lists, length]`, padded on the right."""
    padded = [numbers + [value] * (length - len(numbers)) for numbers in lists]
    return torch.tensor(padded, dtype=torch.int64)


def _find_supervised(samples: list[dict[str, Any]], length: int, packed: bool) -> dict[str, Any]:
    """Return where labels are, and the labels, of samples in rows of `length` or in one row."""
    rows = [sample["labels"] for sample in samples]
    if packed:
        rows = [[label for row in rows for label in row]]
    whole = _pad(rows, length, IGNORE_INDEX)
    flat = whole.flatten()
    supervised = (flat != IGNORE_INDEX).nonzero().flatten()
    return {
        "labels": whole,
        "supervised": supervised,
        "supervised_labels": flat[supervised],
        "num_labels": len(supervised),
    }


def _join_labels(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return where labels are, the labels and their numbers, of packs that share beginnings.

    A position with several labels is in `supervised` for each of them; `supervised_once` has the
    different ones. `supervised_counts` `[N]` is the number of samples that have the label there,
    and `num_labels` their sum.
    """
    found, start = [], 0
    for sample in samples:
        if not sample.get("is_filler"):
            found += [(start + place, *rest) for place, *rest in sample["labels"]]
        start += len(sample["input_ids"])
    places, labels, counts = torch.tensor(found, dtype=torch.int64).view(-1, 3).unbind(1)
    return {
        "supervised": places,
        "supervised_once": places.unique_consecutive(),
        "supervised_labels": labels,
        "supervised_counts": counts,
        "num_labels": int(counts.sum()),
    }


def _make_segments(samples: list[dict[str, Any]], total: int) -> dict[str, Any]:
    """Return positions, lengths and perhaps parents of the segments in a row of `total` tokens."""
    lengths: list[int] = []
    parents: list[int] = []
    for sample in samples:
        here = sample.get("segment_lengths", [len(sample["input_ids"])])
        above = sample.get("segment_parents", [-1] * len(here))
        parents += [-1 if parent < 0 else len(lengths) + parent for parent in above]
        lengths += here

    # Padding becomes a sample of its own.
    short = total - sum(lengths)
    lengths, parents = lengths + [short] * (short > 0), parents + [-1] * (short > 0)
    if any("segment_parents" in sample for sample in samples):
        ends: list[int] = []
        for length, parent in zip(lengths, parents, strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        runs = [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        found: dict[str, Any] = {"segment_parents": parents}
    else:
        lengths = [n for n in lengths if n > 0]  # attention takes no sample without a token
        runs, found = [torch.arange(n) for n in lengths], {}
    return {"position_ids": torch.cat(runs)[None], "segment_lengths": lengths, **found}
