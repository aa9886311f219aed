"""The gate at which a contender's own trainer waits before each step, and what it tells of it.

Orders come as lines of standard input and answers go as JSON lines to a file descriptor, since
libraries print to standard output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

from benchmarks import measure

#: Returns the tokens that a contender's student writes after prompts, with its present weights.
Write = Callable[[list[list[int]]], list[list[int]]]


class Done(Exception):
    """No more steps are wanted; it ends the loop of a trainer."""


class Gate:
    """Lets a trainer take one step at a time.

    Args:
        orders: `step`, `halves`, or nothing more.
        answers: of one line to each order.
        gradient: the file that holds the gradient of the first step.
    """

    def __init__(self, orders: TextIO, answers: TextIO, gradient: Path):
        self._orders, self._answers = orders, answers
        self._gradient = gradient
        self.write: Write | None = None
        self._steps = 0
        self._told: dict[str, Any] = {}
        self._started = (0.0, 0.0)

    def begin(self) -> None:
        """Wait until a step is wanted.

        Raises:
            Done: none is.
        """
        while (order := self._orders.readline().strip()) == "halves":
            self._tell(self._compare_halves())
        if order != "step":
            raise Done
        self._told = {"loss": 0.0, "supervised": 0, "prompts": [], "texts": [], "writing": (0, 0)}
        measure.reset_peak()
        self._started = _now()

    @contextmanager
    def time_writing(self) -> Iterator[None]:
        """Count what the block takes as writing."""
        began = _now()
        yield
        self._told["writing"] = _add(self._told["writing"], _since(began))

    def add_texts(self, prompts: list[list[int]], texts: list[list[int]]) -> None:
        """Note what the student wrote after prompts."""
        self._told["prompts"] += prompts
        self._told["texts"] += texts

    def add_loss(self, loss: float, supervised: int) -> None:
        """Note a micro-batch's part of the step's loss, and the tokens that are in it."""
        self._told["loss"] += loss
        self._told["supervised"] += supervised

    def keep_gradient(self, named: Iterable[tuple[str, Any]]) -> None:
        """Write the first step's gradient, from pairs of a weight's name and its gradient."""
        if self._steps == 0:
            found = {name: part.detach().float().cpu().contiguous() for name, part in named}
            save_file(found, self._gradient)

    def end(self) -> None:
        """Tell what the step took and gave."""
        total, writing = _since(self._started), self._told.pop("writing")
        self._steps += 1
        for name, seconds in (("total", total), ("writing", writing)):
            self._told |= {f"{name} s": seconds[0], f"{name} CPU s": seconds[1]}
        self._tell({**self._told, "peak": measure.read_peak()})

    def _compare_halves(self) -> list[int]:
        """Return how many of a step's texts come again when each half of the prompts is written by
        itself, as on two ranks, and the number of texts."""
        assert self.write is not None
        prompts = self._told["prompts"]
        middle = len(prompts) // 2
        made = []
        for parts in ([prompts], [prompts[:middle], prompts[middle:]]):
            torch.manual_seed(1)
            made.append([text for part in parts for text in self.write(part)])
        return [sum(a == b for a, b in zip(*made, strict=True)), len(prompts)]

    def _tell(self, answer: Any) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def _now() -> tuple[float, float]:
    """Return (wall, CPU of all threads of this process), once the device is idle, seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - began[0], cpu - began[1]


def _add(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]
