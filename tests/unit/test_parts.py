"""The tokens of micro-batches, split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.data.prefixes import SharedDataset
from ds_kd.data.sampler import FILLER, WithFiller
from ds_kd.parallel.sequence import divide_heads, find_shared
from ds_kd.teachers.cache.keys import KEYS, AddKeys
from ds_kd.train.parts import TakePart
from tests import tiny

RANKS = 3


def padded(rows):
    return rows[:4]


def packed(rows):
    packs = PackedDataset(rows, 40)
    return [packs[0], packs[1]]


def shared(rows):
    packs = SharedDataset(tiny.branches(rows), 40)
    return [packs[0], packs[1]]


def filler(rows):
    return [WithFiller(rows)[FILLER]]


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """`[rows, length]` tensors of the ranks → the whole one."""
    return torch.stack(parts, dim=2).flatten(1)


def supervised(batch: dict, rank: int, size: int) -> list[tuple]:
    """(row, place in it, label, count, key of the cache) of each supervised position."""
    places, width = batch["supervised"], batch["input_ids"].shape[1]
    counts = batch.get("supervised_counts", torch.ones_like(places))
    return [
        (place // width, place % width * size + rank, *rest)
        for place, *rest in zip(
            places.tolist(),
            batch["supervised_labels"].tolist(),
            counts.tolist(),
            batch[KEYS].tolist(),
            strict=True,
        )
    ]


@pytest.mark.parametrize("choose", [padded, packed, shared, filler])
def test_the_parts_of_the_ranks_make_up_the_batch(choose):
    samples = choose(tiny.samples(7, seed=3, masked=(3,)))
    collate = AddKeys(default_collater)
    whole = collate(samples)
    parts = [TakePart(collate, rank, RANKS)(samples) for rank in range(RANKS)]
    length = whole["input_ids"].shape[1]

    # Tokens and their positions, sorted as attention sorts them, then padding.
    ids, positions = (join([p[name] for p in parts]) for name in ("input_ids", "position_ids"))
    assert ids.shape[1] % RANKS == 0 and ids.shape[1] - length < RANKS
    assert torch.equal(ids[:, :length], whole["input_ids"])
    expected = whole.get("position_ids", torch.arange(length).expand(len(ids), -1))
    assert torch.equal(positions[:, :length], expected)

    # A supervised position has its label, its count and its key on the rank that has its token.
    of_parts = [row for rank, part in enumerate(parts) for row in supervised(part, rank, RANKS)]
    assert sorted(of_parts) == sorted(supervised(whole, 0, 1))
    assert all(isinstance(part[KEYS], np.ndarray) for part in parts)

    for name in ("num_labels", "num_tokens", "num_shared"):
        assert sum(part.get(name, 0) for part in parts) == whole.get(name, 0)
    assert sum(part["num_slots"] for part in parts) == ids.numel()
    if "segment_lengths" in whole:
        for part in parts:  # attention sees all tokens
            assert sum(part["segment_lengths"]) == ids.shape[1]
            lengths = part["segment_lengths"][: len(whole["segment_lengths"])]
            assert lengths == whole["segment_lengths"]
            if "segment_parents" in whole:
                assert len(part["segment_parents"]) == len(part["segment_lengths"])


def test_supervised_tokens_at_the_end_of_samples_are_shared_out_evenly():
    rows = [{"input_ids": [5] * 60, "labels": [-100] * 48 + [7] * 12, "sample_id": "a"}]
    parts = [TakePart(default_collater, rank, RANKS)(rows) for rank in range(RANKS)]
    assert [part["num_labels"] for part in parts] == [4, 4, 4]


def test_heads_are_divided_as_evenly_as_can_be():
    assert [[*run] for run in divide_heads(9, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert find_shared(divide_heads(9, 2)[1], 3) == [1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="2 heads, and each of 3 ranks needs one"):
        divide_heads(2, 3)
