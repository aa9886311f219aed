"""Pack whole samples into sequences of one length, so that little is computed for padding.

Positions restart at 0 with every sample, and attention stays inside it: by `ds_kd.models.attention`
with SDPA, variable-length kernels with flash attention, and transformers' block mask otherwise.
Labels are shifted inside each sample, so that none belongs to the next one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


def lengths_of(dataset: Any) -> list[int]:
    """Return the number of tokens of each sample, without padding."""
    names = getattr(dataset, "column_names", None)
    if names is None:
        return [int(s.get("num_tokens", len(s["input_ids"]))) for s in dataset]
    return list(dataset["num_tokens"]) if "num_tokens" in names else _count_ids(dataset)


def text_lengths_of(dataset: Any) -> list[int]:
    """Return the number of positions that each sample takes as a model is given it: with padding,
    and of a user's own pack, whose positions restart, those of its longest text.

    Args:
        dataset: samples, or `PackedDataset` or `SharedDataset`, which leave padding out.
    """
    lengths, below = None, dataset
    if hasattr(dataset, "packs"):
        lengths, below = dataset.lengths, dataset.dataset
    if hasattr(below, "column_names"):
        return _count_ids(below) if lengths is None else lengths
    ends = lengths or itertools.repeat(None)
    pairs = zip(below, ends, strict=False)
    return [
        max(segments_of(s, len(s["input_ids"]) if n is None else n), default=0) for s, n in pairs
    ]


def _count_ids(dataset: Any) -> list[int]:
    """Return the number of `input_ids` of each sample of a `datasets.Dataset`, without making the
    lists."""
    import pyarrow.compute as pc

    found: list[int] = pc.list_value_length(
        dataset.with_format("arrow")["input_ids"][:]
    ).to_pylist()
    return found


def pack(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Pack by best fit decreasing: each sample, longest first, goes where it leaves least room.

    Args:
        lengths: tokens of each sample.
        size: tokens a pack holds.
        seed: seed of the order among samples of equal length.

    Returns:
        Packs, each a rising list of sample numbers, in the order of their first samples.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    refuse_longest(lengths, size)
    # `rooms` is sorted, so that the smallest room that is large enough is found by bisection.
    shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    open_packs: dict[int, list[list[int]]] = {}  # room left → packs
    rooms: list[int] = []  # the keys of open_packs, rising
    packs: list[list[int]] = []
    for index in sorted(shuffled, key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = size, list[int]()
            packs.append(chosen)
        else:
            room = rooms[at]
            chosen = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]

        chosen.append(index)
        left = room - length
        if left not in open_packs:
            open_packs[left] = []
            bisect.insort(rooms, left)
        open_packs[left].append(chosen)
    return sorted(sorted(chosen) for chosen in packs)


def refuse_longest(lengths: Sequence[int], size: int) -> None:
    """Refuse samples of which one is longer than a pack.

    Raises:
        ValueError: names the longest one.
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > size:
        raise ValueError(
            f"sample {longest} has {lengths[longest]} tokens; give packed_sequence_size: "
            f"{lengths[longest]} or more, or cut samples with seq_length and truncation: true"
        )


class PackedDataset(Dataset):
    """A data set of packs.

    Args:
        dataset: samples with `input_ids` and `labels`.
        size: tokens a pack holds; shorter packs are not filled up.
        seed: passed to `pack`.

    Raises:
        ValueError: a sample is longer than `size`.
    """

    def __init__(self, dataset: Any, size: int, seed: int = 0):
        self.dataset, self.size = dataset, size
        self.lengths = lengths_of(dataset)
        self.packs = pack(self.lengths, size, seed)

    @property
    def fill(self) -> float:
        """Return the share of the packs' room that tokens take."""
        return sum(self.lengths) / (self.size * len(self.packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        packed: dict[str, list] = {
            name: [] for name in ("input_ids", "labels", "segment_lengths", "sample_ids")
        }
        for number in self.packs[index]:
            sample, length = self.dataset[number], self.lengths[number]
            packed["input_ids"] += sample["input_ids"][:length]
            packed["labels"] += sample["labels"][:length]
            # A user's sample may be a pack itself, whose samples stay apart.
            packed["segment_lengths"] += segments_of(sample, length)
            packed["sample_ids"].append(sample.get("sample_id", str(number)))
        return packed


def segments_of(sample: dict[str, Any], length: int) -> list[int]:
    """Return the lengths of the samples in the first `length` tokens of a sample, which may be a
    user's own pack, padded behind them."""
    found, room = [], length
    for size in sample.get("segment_lengths") or [length]:
        if room > 0:
            found.append(min(size, room))
        room -= size
    return found
