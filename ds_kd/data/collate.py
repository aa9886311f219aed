"""Samples → one micro-batch of tensors."""

from __future__ import annotations

from typing import Any

import torch

from ds_kd.data.labels import IGNORE_INDEX


def default_collater(
    samples: list[dict[str, Any]], pad_seq_len_divisible: int | None = None, pad_token_id: int = 0
) -> dict[str, Any]:
    """Pad on the right, or lay packs end to end, and find the supervised positions.

    No attention mask is made: under a causal mask a real token never looks to its right, so right
    padding cannot reach it, and attention without a mask takes the fast causal kernels. Which token
    pads is therefore of no consequence either.

    Args:
        samples: each with `input_ids` and `labels` (lists of the same length, already shifted);
            `sample_id`, or `sample_ids` and `segment_lengths` of a pack; `num_tokens` where some of
            the tokens are padding already; `is_filler` where it stands for no sample.
        pad_seq_len_divisible: round the padded length up to a multiple of this.
        pad_token_id: put where there is no token.

    Returns:
        `input_ids`, `labels` `[batch, length]` int64; `rows` `[N]` int64, flat indices of the
        supervised positions; `targets` `[N]` int64, the labels there; `num_labels` N,
        `num_tokens` (not counting padding) and `num_slots` (counting it), ints; `sample_ids`,
        strings. Packs give one row, `position_ids` `[1, length]` int64 that start again with every
        sample, and `segment_lengths`, a list of ints.
    """
    real = [sample for sample in samples if not sample.get("is_filler")]
    ids = [i for s in real for i in s.get("sample_ids") or [s.get("sample_id", "")]]
    num_tokens = sum(sample.get("num_tokens", len(sample["input_ids"])) for sample in real)
    packed = any("segment_lengths" in sample for sample in samples)
    extra: dict[str, Any] = {}
    if packed:
        lengths = [n for s in samples for n in s.get("segment_lengths", [len(s["input_ids"])])]
        samples = [
            {name: [x for s in samples for x in s[name]] for name in ("input_ids", "labels")}
        ]
    length = max(1, *(len(sample["input_ids"]) for sample in samples))
    if pad_seq_len_divisible:
        length = -(-length // pad_seq_len_divisible) * pad_seq_len_divisible
    if packed:
        extra = _make_segments(lengths, length)

    def pad(name: str, value: int) -> torch.Tensor:
        rows = [sample[name] + [value] * (length - len(sample[name])) for sample in samples]
        return torch.tensor(rows, dtype=torch.int64)

    input_ids, labels = pad("input_ids", pad_token_id), pad("labels", IGNORE_INDEX)
    flat = labels.flatten()
    rows = (flat != IGNORE_INDEX).nonzero().flatten()
    return {
        "input_ids": input_ids,
        "labels": labels,
        "rows": rows,
        "targets": flat[rows],
        "num_labels": len(rows),
        "num_tokens": num_tokens,
        "num_slots": input_ids.numel(),
        "sample_ids": [str(i) for i in ids],
        **extra,
    }


def _make_segments(lengths: list[int], total: int) -> dict[str, Any]:
    """Return the positions and lengths of a pack's samples in a row of `total` tokens."""
    # What pads is a sample of its own; one without a token is none to attention.
    lengths = [n for n in lengths if n > 0]
    lengths += [total - sum(lengths)] * (total > sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"position_ids": positions, "segment_lengths": lengths}
