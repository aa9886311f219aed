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
            of a pack; `num_tokens` if some are padding; `is_filler` if it is no sample.
        pad_seq_len_divisible: round the padded length up to a multiple of this.
        pad_token_id: the padding token.

    Returns:
        `input_ids`, `labels` `[batch, length]` int64; `supervised` `[N]` int64, flat indices of the
        supervised positions; `supervised_labels` `[N]` int64; `num_labels` N, `num_tokens`
        (without padding), `num_slots` (with it); `sample_ids`. Packs make one row, and give
        `position_ids` `[1, length]`, which restart with every sample, and `segment_lengths`.
    """
    # A filler keeps this rank's collectives going and counts as nothing.
    real = [sample for sample in samples if not sample.get("is_filler")]
    ids = [i for s in real for i in s.get("sample_ids") or [s.get("sample_id", "")]]
    num_tokens = sum(sample.get("num_tokens", len(sample["input_ids"])) for sample in real)
    packed = any("segment_lengths" in sample for sample in samples)
    if packed:
        lengths = [n for s in samples for n in s.get("segment_lengths", [len(s["input_ids"])])]
        names = ("input_ids", "labels")
        samples = [{name: [x for s in samples for x in s[name]] for name in names}]
    length = max(1, *(len(sample["input_ids"]) for sample in samples))
    if pad_seq_len_divisible:
        length = -(-length // pad_seq_len_divisible) * pad_seq_len_divisible
    extra = _make_segments(lengths, length) if packed else {}

    # The models' heads are applied at the supervised positions alone.
    input_ids = _pad([sample["input_ids"] for sample in samples], length, pad_token_id)
    labels = _pad([sample["labels"] for sample in samples], length, IGNORE_INDEX)
    flat = labels.flatten()
    supervised = (flat != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": input_ids,
        "labels": labels,
        "supervised": supervised,
        "supervised_labels": flat[supervised],
        "num_labels": len(supervised),
        "num_tokens": num_tokens,
        "num_slots": input_ids.numel(),
        "sample_ids": [str(i) for i in ids],
        **extra,
    }


def _pad(lists: list[list[int]], length: int, value: int) -> torch.Tensor:
    """Return lists as one int64 tensor `[lists, length]`, padded on the right."""
    padded = [numbers + [value] * (length - len(numbers)) for numbers in lists]
    return torch.tensor(padded, dtype=torch.int64)


def _make_segments(lengths: list[int], total: int) -> dict[str, Any]:
    """Return the positions and lengths of a pack's samples in a row of `total` tokens."""
    # Padding becomes a sample of its own; attention takes no sample without a token.
    lengths = [n for n in lengths if n > 0]
    lengths += [total - sum(lengths)] * (total > sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"position_ids": positions, "segment_lengths": lengths}
