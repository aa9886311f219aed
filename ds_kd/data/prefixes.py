"""Packs in which samples that begin alike share that beginning, so that it is computed once.

The samples of a pack form a tree (a trie over token ids): a node is a run of tokens, its children
are the different continuations. Nodes are laid out parents first, one subtree after the other:

    samples   A B C x y    A B C z    A B q        laid out   A B | C | x y | z | q
    parents of the nodes                                       -1   0    1    1   0

Attention lets a token see the nodes on the way to its root and nothing else (`models.attention`),
and positions go on from the parent's last one, so every sample is computed as if it were alone. A
position inside a shared beginning may predict another token for every sample: it then has several
labels. A label that several samples have at one position counts once for each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.data.packing import lengths_of, pack, refuse_longest

#: A common beginning of fewer tokens does not decide which samples share a pack. It would only make
#: packs less mixed; samples that meet in a pack share whatever they have in common.
_WORTH = 16


@dataclass(frozen=True)
class Layout:
    """Samples laid out as a tree.

    Args:
        lengths: tokens of each node.
        parents: the parent of each node, -1 for a root.
        tokens: the tokens, node after node.
        paths: for each sample the place of each of its tokens in `tokens`.
    """

    lengths: list[int]
    parents: list[int]
    tokens: np.ndarray
    paths: list[np.ndarray]


def count_common(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of tokens with which both begin."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size


def lay_out(samples: Sequence[np.ndarray]) -> Layout:
    """Lay samples out as a tree; those that begin alike need not stand side by side."""
    order = sorted(range(len(samples)), key=lambda i: (_key(samples[i]), i))
    path: list[list[int]] = []  # [block, its first depth, depth up to which the sample takes it]
    cuts: list[set[int]] = []  # depths at which a block is cut into nodes
    blocks: list[tuple[int, int, int]] = []  # (first depth, place of its first token, block above)
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(samples)
    tokens, place = [], 0

    # A sample's block holds the tokens that the sample before it in the order has not.
    last = np.empty(0, np.int64)
    for number in order:
        sample = samples[number]
        depth = count_common(last, sample)
        while path and path[-1][1] >= depth:
            path.pop()
        above = path[-1][0] if path else -1
        if path:
            path[-1][2] = min(path[-1][2], depth)
            cuts[above].add(depth)
        if len(sample) > depth:
            path.append([len(blocks), depth, len(sample)])
            blocks.append((depth, place, above))
            cuts.append({len(sample)})
            tokens.append(sample[depth:])
            place += len(sample) - depth
        runs = [blocks[b][1] + np.arange(end - start) for b, start, end in path]
        paths[number] = np.concatenate([np.empty(0, np.int64), *runs])
        last = sample
    flat = np.concatenate([np.empty(0, np.int64), *tokens])
    return Layout(*_cut_into_nodes(blocks, cuts), flat, paths)


def _cut_into_nodes(
    blocks: list[tuple[int, int, int]], cuts: list[set[int]]
) -> tuple[list[int], list[int]]:
    """Return (lengths, parents) of the nodes into which blocks are cut where others hang."""
    lengths: list[int] = []
    parents: list[int] = []
    ends: dict[tuple[int, int], int] = {}  # (block, depth) → the node that ends there
    for block, (first, _, above) in enumerate(blocks):
        parent = ends[above, first] if above >= 0 else -1
        for start, end in pairwise([first, *sorted(cuts[block])]):
            ends[block, end] = len(lengths)
            parents.append(parent)
            parent = len(lengths)
            lengths.append(end - start)
    return lengths, parents


def pack_by_prefix(samples: Sequence[np.ndarray], size: int, seed: int) -> list[list[int]]:
    """Pack samples so that those with a long common beginning share a pack.

    From the longest common beginnings to the shorter ones, what hangs below a node of the tree is
    kept together if a pack holds it, and is packed by best fit decreasing (`packing.pack`) if not.

    Args:
        samples: the tokens of each.
        size: tokens a pack holds, each shared one counted once.
        seed: seed of the order among bundles of equal size.

    Returns:
        Packs, each a rising list of sample numbers, in the order of their first samples.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    refuse_longest([len(sample) for sample in samples], size)
    order = sorted(range(len(samples)), key=lambda i: (_key(samples[i]), i))
    # The way from the root to the last sample: (depth, bundles that hang there).
    path: list[tuple[int, list[_Bundle]]] = [(0, [])]

    def close_down_to(depth: int) -> None:
        while path[-1][0] > depth:
            at, bundles = path.pop()
            above = max(depth, path[-1][0])
            if above > path[-1][0]:
                path.append((above, []))
            path[-1][1].extend(_lift(bundles, at, above, size, seed))

    last = np.empty(0, np.int64)
    for number in order:
        sample = samples[number]
        close_down_to(count_common(last, sample))
        if len(sample) > path[-1][0]:
            path.append((len(sample), []))
        path[-1][1].append(_Bundle(0, len(sample), [number]))
        last = sample
    close_down_to(0)
    return sorted(sorted(bundle.samples) for bundle in _fill(path[0][1], size, seed))


@dataclass(frozen=True)
class _Bundle:
    """Samples that stay together.

    Args:
        tokens: those below the node at which the bundle hangs.
        depth: up to here it has tokens in common with another one at the same node.
        samples: their numbers.
    """

    tokens: int
    depth: int
    samples: list[int]


def _lift(bundles: list[_Bundle], at: int, above: int, size: int, seed: int) -> list[_Bundle]:
    """Return what hangs at depth `at` as it hangs at the node above, joined if that is worth it."""
    if all(bundle.depth - above < _WORTH for bundle in bundles):
        return [_Bundle(b.tokens + at - above, b.depth, b.samples) for b in bundles]
    joined = _fill(bundles, size - at, seed)
    return [_Bundle(b.tokens + at - above, above, b.samples) for b in joined]


def _fill(bundles: list[_Bundle], room: int, seed: int) -> list[_Bundle]:
    """Join bundles into as few as `room` tokens allow for each."""
    costs = [bundle.tokens for bundle in bundles]
    parts = [[*range(len(bundles))]] if sum(costs) <= room else pack(costs, room, seed)
    return [
        _Bundle(sum(costs[k] for k in part), 0, [i for k in part for i in bundles[k].samples])
        for part in parts
    ]


def _key(sample: np.ndarray) -> bytes:
    """Return bytes in whose order samples that begin alike are neighbours."""
    return sample.astype(">u4").tobytes()


def _read_tokens(dataset: Any, lengths: list[int]) -> list[np.ndarray]:
    """Return the tokens of each sample, without padding, 4 bytes each."""
    found: list[np.ndarray] = []
    if not hasattr(dataset, "with_format"):
        for number, length in enumerate(lengths):
            sample = dataset[number]
            if "segment_lengths" in sample:
                raise ValueError(f"sample {number} is a pack already; remove share_prefixes")
            found.append(np.array(sample["input_ids"][:length], np.int32))
        return found
    for chunk in filter(len, dataset.with_format("arrow")["input_ids"][:].chunks):
        flat = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
        found += np.split(flat, ends[:-1])
    return [ids[:n] for ids, n in zip(found, lengths, strict=True)]


class SharedDataset(Dataset):
    """A data set of packs whose samples share their common beginnings.

    A pack has `input_ids` and `segment_lengths` of the tree's nodes, `segment_parents`,
    `sample_ids`, `num_tokens` of its samples, and as `labels` a list of (place, label, number of
    samples), rising, one for every supervised token.

    The packs depend on the samples, the size and the seed alone. Every rank finds the same ones.

    Args:
        dataset: samples with `input_ids` and `labels`.
        size: tokens a pack holds, shared ones counted once; shorter packs are not filled up.
        seed: passed to `pack_by_prefix`.
        counts: give equal labels of one place once, with their number; otherwise each by itself.

    Raises:
        ValueError: a sample is longer than `size`, or a pack itself.
    """

    def __init__(self, dataset: Any, size: int, seed: int = 0, counts: bool = True):
        self.dataset, self.size, self._counts = dataset, size, counts
        self.lengths = lengths_of(dataset)
        self.packs = pack_by_prefix(_read_tokens(dataset, self.lengths), size, seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = self.packs[index]
        samples = [self.dataset[number] for number in numbers]
        lengths = [self.lengths[number] for number in numbers]
        layout = lay_out(
            [np.array(s["input_ids"][:n]) for s, n in zip(samples, lengths, strict=True)]
        )

        # A place may have several labels, and a label several samples.
        found: Counter[tuple[int, int]] = Counter()
        for sample, path in zip(samples, layout.paths, strict=True):
            labels = sample["labels"][: len(path)]
            found.update(
                (place, label)
                for place, label in zip(path.tolist(), labels, strict=True)
                if label != IGNORE_INDEX
            )
        ids = [s.get("sample_id", str(i)) for s, i in zip(samples, numbers, strict=True)]
        return {
            "input_ids": layout.tokens.tolist(),
            "labels": self._list_labels(found),
            "segment_lengths": layout.lengths,
            "segment_parents": layout.parents,
            "sample_ids": ids,
            "num_tokens": sum(lengths),
        }

    def _list_labels(self, found: Counter[tuple[int, int]]) -> list[tuple[int, int, int]]:
        if self._counts:
            return sorted((*pair, count) for pair, count in found.items())
        return sorted((*pair, 1) for pair in found.elements())
