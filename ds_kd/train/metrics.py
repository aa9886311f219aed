"""One dict per step → console, `metrics.jsonl`, TensorBoard and, where asked for, Weights & Biases.
Rank 0 only."""

from __future__ import annotations

import functools
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from ds_kd.errors import first_line

_GIB = 2**30
_EVENTS = "TensorBoard's events"


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, GiB: the allocator's on a GPU, the process's resident set on
    a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class Metrics:
    """Where a run's numbers go.

    Args:
        directory: holds `metrics.jsonl` and the TensorBoard events; None writes no files. What a
            run that was killed had logged there after the step from which this one goes on is
            taken out when the first record is written: each step stands there once, and so does
            its validation.
        tensorboard: write events.
        config_text: the resolved YAML, shown as text in TensorBoard.
        wandb: keyword arguments of `wandb.init`, or None.
        total_steps: of the run, for the console.
        out: console.

    Raises:
        ValueError: `wandb` is asked for and not installed, or does not start.
    """

    def __init__(
        self,
        directory: Path | None,
        tensorboard: bool = True,
        config_text: str = "",
        wandb: dict[str, Any] | None = None,
        total_steps: int = 0,
        out: TextIO | None = None,
    ):
        self.total_steps, self.out = total_steps, out or sys.stdout
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._events, self._config_text = tensorboard, config_text
        self._file: TextIO | None = None
        self._writer: Any = None
        self._wandb: Any = None
        self._told: set[Any] = set()  # what could not be written
        self._started = time.monotonic()
        self._first_step: int | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()  # tells now whether it can be written
        if wandb is not None:
            try:
                import wandb as client
            except ImportError:
                raise ValueError(
                    "wandb: the package is not installed; pip install wandb, or remove the section"
                ) from None
            try:
                self._wandb = client.init(**wandb)
            except Exception as error:  # its own kinds, and TypeError for an unknown argument
                raise ValueError(f"wandb: wandb.init says: {first_line(error)}") from error

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Record a training step; `values` by tag."""
        self._record(step, values)
        self.say(self._line(step, values))

    def validation(
        self,
        step: int,
        values: dict[str, float],
        sets: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """Record a validation; tags get the prefix `val_`, and `val_<name>_` of a named set.

        Args:
            values: by tag, over all sets.
            sets: of each named set.
        """
        record = {f"val_{tag}": value for tag, value in values.items()}
        for name, part in (sets or {}).items():
            record |= {f"val_{name}_{tag}": value for tag, value in part.items()}
        self._record(step, record)
        self.say(f"validation after step {step}: {_show(values)}")
        for name, part in (sets or {}).items():
            self.say(f"  {name}: {_show(part)}")

    def close(self) -> None:
        for name, sink in ((self._path, self._file), (_EVENTS, self._writer)):
            if sink is not None:
                self._try(name, sink.close)
        if self._wandb is not None:
            self._wandb.finish()

    def _open(self, path: Path, step: int, place: float) -> None:
        """Open the files for a run whose first record is of `step` and stands at `place`."""
        _keep_before(path, place)
        # One line per record, written through at once: a killed run keeps all it logged.
        self._file = path.open("a", buffering=1)
        if self._events:
            from torch.utils.tensorboard import SummaryWriter

            # A file of its own, which has TensorBoard drop the later steps of those before it.
            self._writer = SummaryWriter(
                str(path.parent), purge_step=math.ceil(place) if step else 0
            )
            threading.excepthook = functools.partial(_hook, threading.excepthook)
            self._writer.add_text("config", f"```yaml\n{self._config_text}\n```", step)

    def _record(self, step: int, values: dict[str, float]) -> None:
        path, line = self._path, json.dumps({"step": step, **values}) + "\n"
        if self._file is None and path is not None:
            self._try(path, lambda: self._open(path, step, _place(step, values)))
        if self._file is not None:
            self._try(path, functools.partial(self._file.write, line))
        if self._writer is not None and not self._try(_EVENTS, self._draw, step, values):
            self._writer = None  # its thread has ended
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def _try(self, name: Any, write: Callable[..., Any], *arguments: Any) -> bool:
        """Return whether it could be written. A full disk is no reason to end a run: it is said
        once, and what does not fit is not logged."""
        try:
            write(*arguments)
        except OSError as error:
            if name not in self._told:
                self.say(f"{name} cannot be written ({first_line(error)}); training goes on")
            self._told.add(name)
            return False
        return True

    def _line(self, step: int, v: dict[str, float]) -> str:
        width = len(str(self.total_steps))
        losses = "  ".join(
            f"{label} {v[tag]:8.4f}"
            for label, tag in (("loss", "train_loss"), ("ce", "ce_loss"), ("kd", "kd_loss"))
            if tag in v
        )
        return (
            f"step {step:>{width}}/{self.total_steps}  {losses}  lr {v['learning_rate']:.2e}  "
            f"grad {v['grad_norm']:8.3f}  {v['tokens_per_sec']:8.0f} tok/s  "
            f"left {self._time_left(step)}"
        )

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started = step, now
            return "  --:--"
        seconds = (now - self._started) / (step - self._first_step) * (self.total_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"


def _hook(others: Callable[[Any], Any], ended: Any) -> None:
    """Keep the end of TensorBoard's writing thread to the error that `add_scalar` raises of it."""
    if type(ended.thread).__name__ != "_AsyncWriterThread":
        others(ended)


def _show(values: dict[str, float]) -> str:
    """Return the values of a validation that the console shows."""
    labels = {"loss": "loss", "ce_loss": "ce", "kd_loss": "kd", "top1_agreement": "top-1 agreement"}
    shown = (f"{labels[tag]} {values[tag]:.4f}" for tag in labels if tag in values)
    return "  ".join(shown)


def _keep_before(path: Path, place: float) -> None:
    """Cut a log of JSON lines to what comes before `place`, at one stroke; a torn last line goes
    too. A log of which nothing would stay is another run's, and is set aside."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    kept = [line for line in text.splitlines(keepends=True) if _place_of(line) < place]
    if "".join(kept) == text:
        return
    if not kept:
        number = sum(1 for _ in path.parent.glob(f"{path.stem}.before*{path.suffix}")) + 1
        path.rename(path.with_name(f"{path.stem}.before{number}{path.suffix}"))
        return
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(kept))
    aside.replace(path)


def _place(step: int, values: dict[str, Any]) -> float:
    """Return where a record stands in a log: a step, then its validation."""
    return step + 0.5 * any(name.startswith("val_") for name in values)


def _place_of(line: str) -> float:
    """Return the place of a log's line; infinity for a line that is none."""
    try:
        record = json.loads(line)
        return _place(record["step"], record) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
