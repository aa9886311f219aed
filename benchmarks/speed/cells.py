"""The cells that `kd_step.py` and `scaling.py` measure: samples, sizes and ranks of a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        name: how `--cells` calls it.
        kind: `text` (pieces of one length), `squad` (real rows), `chat` (answers behind one system
            prompt of 400 tokens) or `workspace` (the loss alone, from hidden states). ds_kd packs
            samples of `squad` and `chat`.
        length: tokens of a text sample.
        masked: share of a text sample that is not supervised.
        samples: per optimizer step.
        micro_batch: samples per forward.
        vocab: rows of both heads; 0 takes the models'.
        ranks: processes, with all cores between them.
        shares: ds_kd with shared beginnings takes part too.
    """

    name: str
    kind: str = "text"
    length: int = 512
    masked: float = 0.0
    samples: int = 4
    micro_batch: int = 2
    vocab: int = 0
    dtype: str = "fp32"
    ranks: int = 1
    shares: bool = False

    @property
    def packs(self) -> bool:
        return self.kind in ("squad", "chat")


BASE = Cell("text-512")
DEFAULT = [
    BASE,
    replace(BASE, name="text-512-half", masked=0.5),
    replace(BASE, name="text-512-5pc", masked=0.95),
    replace(BASE, name="text-2048", length=2048, samples=1, micro_batch=1),
    replace(BASE, name="vocab-128k", vocab=128256),
    replace(BASE, name="vocab-152k", vocab=151936),
    Cell("squad", "squad", samples=8, micro_batch=8),
    replace(BASE, name="bf16", dtype="bf16"),
    Cell("squad-bf16", "squad", samples=8, micro_batch=8, dtype="bf16"),
    replace(BASE, name="2-ranks", ranks=2),
    Cell("squad-shared", "squad", samples=32, micro_batch=8, shares=True),
    Cell("chat-shared", "chat", samples=16, micro_batch=8, shares=True),
    Cell("workspace", "workspace", vocab=128256, length=4096),
]


def full() -> list[Cell]:
    """Return the default cells, and one for every mask × length × vocabulary × dtype."""
    cells = [
        Cell(
            f"{length}-{masked:.0%}-{vocab // 1000}k-{dtype}",
            length=length,
            masked=masked,
            vocab=vocab,
            dtype=dtype,
            samples=max(1, 2048 // length),
            micro_batch=max(1, 1024 // length),
        )
        for length, masked, vocab, dtype in itertools.product(
            (512, 1024, 2048, 4096), (0.0, 0.5, 0.95), (49152, 128256, 151936), DTYPES
        )
    ]
    return [*DEFAULT, *cells]
