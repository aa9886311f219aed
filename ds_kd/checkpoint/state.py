"""The counters of a run, and the random-number generators of one rank."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch


class Buffer(Protocol):
    """Something that outlives a step and cannot be made again, such as texts that the student wrote
    with earlier weights."""

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return what the steps after `step` need, as plain values, or None if that is nothing."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what a saved run had."""


@dataclass
class TrainState:
    """Counters of a run; the position in the data follows from `step`.

    Args:
        step: optimizer steps done.
        tokens: real (unpadded) tokens seen, all ranks.
        labels: supervised tokens seen, all ranks.
        skipped: steps that were skipped, as their loss or gradient was not finite.
        validated: step of the last validation; -1 before the first.
        lowest_loss: lowest validation loss.
        not_lower: number of validations since the lowest loss.
        evaluated: step of the last evaluation; -1 before the first.
    """

    step: int = 0
    tokens: int = 0
    labels: int = 0
    skipped: int = 0
    validated: int = -1
    lowest_loss: float | None = None
    not_lower: int = 0
    evaluated: int = -1

    def advance(self, labels: int, tokens: int) -> None:
        """Count a step, with the supervised and all tokens that it took on all ranks."""
        self.step += 1
        self.labels += labels
        self.tokens += tokens

    def note_validation(self, loss: float) -> None:
        """Record the loss of a validation after the present step."""
        self.validated = self.step
        # Any number is lower than a lowest loss that is not a number.
        if math.isfinite(loss) and (self.lowest_loss is None or not loss >= self.lowest_loss):
            self.lowest_loss, self.not_lower = loss, 0
        else:
            self.not_lower += 1

    def forget_validations(self) -> None:
        """Discard the lowest loss, if later losses cannot be compared with it."""
        self.lowest_loss, self.not_lower = None, 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, value in saved.items():
            setattr(self, name, value)


def seed_rank(seed: int, rank: int, ranked: bool) -> None:
    """Seed Python's and torch's generators; with `ranked` each rank has its own dropout masks.

    Args:
        rank: of the group of ranks that see different tokens.
    """
    value = seed + rank if ranked else seed
    random.seed(value)
    torch.manual_seed(value)


def rng_state() -> dict[str, Any]:
    """Return the state of this rank's generators as tensors and plain numbers, which
    `weights_only=True` can load."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore a state of `rng_state`; the CUDA state is ignored on a machine without CUDA."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
