"""Keys of the rows of a cache.

Under a causal mask a teacher's hidden state depends on the tokens up to its position and on nothing
else. Their hash is the row's key, so that shuffling, ranks, padding, packs and shared beginnings do
not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ds_kd.data.labels import IGNORE_INDEX

#: The name under which `AddKeys` puts the keys into a micro-batch.
KEYS = "row_keys"


def _hash_run(hasher: Any, tokens: np.ndarray, places: Iterable[int]) -> list[bytes]:
    """Return the hash of all tokens up to each place of a run, and take them into `hasher`.

    Args:
        hasher: has taken the tokens before the run.
        tokens: the run, uint32.
        places: in the run, rising.
    """
    found, done = [], 0
    for place in places:
        hasher.update(tokens[done : place + 1])
        done = place + 1
        found.append(hasher.digest())
    hasher.update(tokens[done:])
    return found


def _new_hasher() -> Any:
    return hashlib.blake2b(digest_size=16)


def _join(found: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(found), "<u8").reshape(-1, 2)


def keys_of_sample(sample: dict[str, Any], length: int | None = None) -> np.ndarray:
    """Return the keys of a sample's supervised positions, `[rows, 2]` uint64.

    Args:
        sample: `input_ids` and shifted `labels`, and `segment_lengths` of a user's own pack.
        length: tokens without padding; None takes all.
    """
    labels = np.asarray(sample["labels"][:length])
    tokens = np.asarray(sample["input_ids"][:length], "<u4")
    places = np.flatnonzero(labels != IGNORE_INDEX)
    found: list[bytes] = []
    start = 0
    for size in sample.get("segment_lengths") or [len(tokens)]:
        end = start + size
        here = places[(places >= start) & (places < end)] - start
        found += _hash_run(_new_hasher(), tokens[start:end], here.tolist())
        start = end
    return _join(found)


def find_keys(batch: dict[str, Any]) -> np.ndarray:
    """Return the keys of a micro-batch's supervised positions, `[rows, 2]` uint64."""
    ids, places = (batch[name].cpu().numpy() for name in ("input_ids", "supervised"))
    lengths = batch.get("segment_lengths") or [ids.shape[1]] * ids.shape[0]
    parents = batch.get("segment_parents") or [-1] * len(lengths)
    tokens = ids.reshape(-1).astype("<u4")
    ends = [0, *accumulate(lengths)]
    cuts = np.searchsorted(places, ends).tolist()

    # A segment of a tree goes on from its parent, whose tokens come before its own.
    hashers: list[Any] = []
    found: list[bytes] = []
    for k, parent in enumerate(parents):
        hasher = hashers[parent].copy() if parent >= 0 else _new_hasher()
        start, end = ends[k], ends[k + 1]
        here = (places[cuts[k] : cuts[k + 1]] - start).tolist()
        found += _hash_run(hasher, tokens[start:end], here)
        hashers.append(hasher)
    return _join(found)


@dataclass(frozen=True)
class AddKeys:
    """Collates samples and adds the keys of their rows, in the loader's worker processes.

    Args:
        collate: makes the micro-batch.
    """

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = self.collate(samples)
        return {**batch, KEYS: find_keys(batch)}
