"""What a run knows about itself, and the random-number generators of one rank."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass
class TrainState:
    """Counters of a run; the position in the data follows from `step`.

    Args:
        step: optimizer steps done.
        tokens: real (unpadded) tokens seen, all ranks.
        labels: supervised tokens seen, all ranks.
        skipped: steps left out, as their loss or gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    labels: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        for name, value in saved.items():
            setattr(self, name, value)


def seed_rank(seed: int, rank: int, ranked: bool) -> None:
    """Seed Python's and torch's generators; with `ranked` each rank draws its own dropout masks."""
    value = seed + rank if ranked else seed
    random.seed(value)
    torch.manual_seed(value)


def rng_state() -> dict[str, Any]:
    """Every generator of this rank, as tensors and plain numbers (loadable with
    `weights_only=True`)."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo `rng_state`; a CUDA state is left out on a machine without CUDA."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
