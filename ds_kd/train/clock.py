"""Time the parts of a step, and say what they mean: rates, shares and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ds_kd.models.operations import Operations
from ds_kd.parallel.world import World, sum_over
from ds_kd.train.batches import Batch


class Clock:
    """Adds up how long each part of a step takes on this rank.

    On a GPU parts are timed by events in its stream, which are read when they have passed: nothing
    waits for the device. A time that has not passed at the end of a step counts to the next.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._passed: list[tuple[str, float]] = []
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block of work on the device."""
        if not self._on_gpu:
            with self.wait(name):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((name, begin, end))

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """Time a block that the host waits for, such as loading data."""
        started = time.perf_counter()
        yield
        self._passed.append((name, time.perf_counter() - started))

    def read(self) -> dict[str, float]:
        """Return seconds by part since the last call."""
        waiting = []
        for name, begin, end in self._pending:
            if end.query():
                self._passed.append((name, begin.elapsed_time(end) / 1000))
            else:
                waiting.append((name, begin, end))
        self._pending, passed, self._passed = waiting, self._passed, []
        seconds: dict[str, float] = {}
        for name, value in passed:
            seconds[name] = seconds.get(name, 0.0) + value
        return seconds


@dataclass(frozen=True)
class Counts:
    """The work of a step, over all ranks.

    Args:
        labels: supervised tokens.
        tokens: tokens.
        slots: tokens and padding.
        samples: samples, those of packs one by one.
        shared: tokens that another sample's computation served.
        memory: peak of each rank before the step, GiB.
    """

    labels: int
    tokens: int
    slots: int
    samples: int
    shared: int
    memory: tuple[float, ...]

    @classmethod
    def of(cls, micro_batches: list[Batch], world: World, memory: float) -> Counts:
        """Count a step's work (a collective).

        Args:
            memory: this rank's.
        """
        names = ("num_labels", "num_tokens", "num_slots")
        here = [float(sum(b[name] for b in micro_batches)) for name in names]
        here += [sum(b.get("num_shared", 0) for b in micro_batches)]
        samples = sum(i != "" for batch in micro_batches for i in batch["sample_ids"])
        # Ranks that see parts of the same samples all know their names.
        here += [samples if world.sequence.rank == 0 else 0]
        if world.tensor.rank > 0:  # these tokens are counted by the group's first rank
            here = [0.0] * len(here)
        # Every rank adds its memory in a place of its own, so that this costs no exchange.
        peaks = [0.0] * world.size
        peaks[world.rank] = memory
        sums = sum_over([*here, *peaks], world.everyone).tolist()
        labels, tokens, slots, shared, samples = (int(total) for total in sums[:5])
        return cls(labels, tokens, slots, samples, shared, tuple(sums[5:]))

    def describe(
        self, seconds: float, parts: dict[str, float], operations: Operations | None
    ) -> dict[str, float]:
        """Return what is logged of a step's speed, by tag.

        Args:
            seconds: from the beginning of its data loading to its end.
            parts: from `Clock.read`.
            operations: of the two models, if they can be counted.
        """
        found = {
            "tokens_per_sec": self.tokens / seconds,
            "padding": 1.0 - (self.tokens - self.shared) / self.slots,
            "supervised": self.labels / self.tokens,
            "throughput/samples_per_sec": self.samples / seconds,
            "time/step": seconds,
        }
        if self.shared:
            found["shared"] = self.shared / self.tokens
        if operations is not None:
            computed = self.tokens - self.shared
            rate = operations.count(computed, self.labels) / seconds / len(self.memory)
            found["throughput/tflops_per_rank"] = rate / 1e12
            if operations.peak is not None:
                found["throughput/mfu"] = rate / operations.peak
        found |= {f"time/{name}": part for name, part in parts.items()}
        return found | {f"memory/rank_{rank}": peak for rank, peak in enumerate(self.memory)}
