"""Samples → one micro-batch of tensors."""

from __future__ import annotations

from typing import Any

import torch

from ds_kd.losses import IGNORE_INDEX


def default_collater(
    samples: list[dict[str, Any]], pad_seq_len_divisible: int | None = None, pad_token_id: int = 0
) -> dict[str, Any]:
    """Pad on the right and find the supervised positions.

    No attention mask is made: under a causal mask a real token never looks to its right, so right
    padding cannot reach it, and attention without a mask takes the fast causal kernels. Which token
    pads is therefore of no consequence either.

    Args:
        samples: each with `input_ids` and `labels` (lists of the same length, already shifted) and,
            but for a filler, `sample_id`; `num_tokens` where some of the tokens are padding
            already.
        pad_seq_len_divisible: round the padded length up to a multiple of this.
        pad_token_id: put where there is no token.

    Returns:
        `input_ids`, `labels` `[batch, length]` int64; `rows` `[N]` int64, flat indices of the
        supervised positions; `targets` `[N]` int64, the labels there; `num_labels` N and
        `num_tokens` (not counting padding), ints; `sample_ids`, strings.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    if pad_seq_len_divisible:
        length = -(-length // pad_seq_len_divisible) * pad_seq_len_divisible
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.int64)
    for i, sample in enumerate(samples):
        input_ids[i, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        labels[i, : len(sample["labels"])] = torch.tensor(sample["labels"])
    flat = labels.flatten()
    rows = (flat != IGNORE_INDEX).nonzero().flatten()
    real = [sample for sample in samples if "sample_id" in sample]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "rows": rows,
        "targets": flat[rows],
        "num_labels": len(rows),
        "num_tokens": sum(sample.get("num_tokens", len(sample["input_ids"])) for sample in real),
        "sample_ids": [str(sample["sample_id"]) for sample in real],
    }
