"""Compare a run's samples with the rows of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ds_kd.config.schema import RunConfig
from ds_kd.parallel.world import World, sum_over
from ds_kd.teachers.cache.keys import keys_of_sample
from ds_kd.teachers.cache.store import Store

_NAMED = 5  # absent samples that a message names


def list_asked(cfg: RunConfig, samples: Any, held_out: dict[str, Any]) -> dict[str, Any]:
    """Return the samples about which the teacher is asked, by the key of their data set."""
    asked = {cfg.dataset.key: samples} if cfg.kd_ratio > 0 else {}
    named = {
        ".".join(filter(None, ("validation_dataset", name))): s for name, s in held_out.items()
    }
    return asked | named if cfg.validates else asked


@dataclass(frozen=True)
class Absent:
    """The rows of a run's samples that a cache lacks.

    Args:
        samples: how many lack rows.
        of: number of all samples.
        rows: rows that are absent.
        names: of a few of the samples.
    """

    samples: int
    of: int
    rows: int
    names: list[str]


def single_samples(samples: Any) -> Iterator[tuple[int, Any, list[int] | None]]:
    """Yield (number, data set, lengths) of every sample; those of packs one by one.

    Args:
        samples: a data set, or one of packs.
    """
    packed = hasattr(samples, "packs")
    below, lengths = (samples.dataset, samples.lengths) if packed else (samples, None)
    for number in range(len(below)):
        yield number, below, lengths


def find_absent(sets: dict[str, Any], store: Store, world: World) -> Absent:
    """Return what a cache lacks; the ranks divide the samples (a collective).

    Args:
        sets: the samples of each data set by the name of its key.
    """
    samples = count = rows = 0
    names: list[str] = []
    for key, data in sets.items():
        for number, below, lengths in single_samples(data):
            if number % world.size != world.rank:
                continue
            sample = below[number]
            length = lengths[number] if lengths else sample.get("num_tokens")
            lacks = int(store.lacks(keys_of_sample(sample, length)).sum())
            count, rows, samples = count + 1, rows + lacks, samples + bool(lacks)
            if lacks and len(names) < _NAMED:
                names.append(f"{key} {sample.get('sample_id', number)}")
    samples, count, rows = (int(n) for n in sum_over([samples, count, rows], world.everyone))
    parts: list[Any] = [names]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, names, group=world.host_group)
    return Absent(samples, count, rows, [name for part in parts for name in part][:_NAMED])
