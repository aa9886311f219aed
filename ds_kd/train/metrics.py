"""Write the metrics of each step to the console, `metrics.jsonl`, TensorBoard and, if asked for,
Weights & Biases. Rank 0 only."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from ds_kd.errors import first_line
from ds_kd.evaluate.statistics import Estimate
from ds_kd.train.layout import choose_charts, format_texts, write_settings

_GIB = 2**30
_EVENTS = "TensorBoard's events"


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this rank so far in GiB: the allocator's on a GPU, the resident set
    of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class Metrics:
    """The destinations of a run's metrics.

    Args:
        directory: holds `metrics.jsonl` and the TensorBoard events; None writes no files. A
            log that is there changes with the first record, as `begin` has told.
        tensorboard: write events.
        config_text: the resolved YAML, shown as text in TensorBoard.
        wandb: keyword arguments of `wandb.init`, or None.
        total_steps: number of steps of the run, for the console.
        settings: numbers and texts by name, by which TensorBoard compares runs.
        out: the console; standard output by default.

    Raises:
        ValueError: `wandb` is wanted and is not installed or does not start.
    """

    def __init__(
        self,
        directory: Path | None,
        tensorboard: bool = True,
        config_text: str = "",
        wandb: dict[str, Any] | None = None,
        total_steps: int = 0,
        out: TextIO | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.total_steps, self.out = total_steps, out or sys.stdout
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._events, self._config_text = tensorboard, config_text
        self._file: TextIO | None = None
        self._writer: Any = None
        self._bar: Any = None
        self._settings, self._tags = settings or {}, set[str]()
        self._wandb: Any = None
        self._reported: set[Any] = set()  # destinations that could not be written
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._run: int | None = None
        self._resumed: int | None = None
        self._only_validates = False
        self._inserted: set[float] = set()  # places of records that were put among others

        # Both destinations are tried now, so that a mistake ends the run before models are loaded.
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a", encoding="utf-8").close()
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

    def begin(self, run: int, resumed: int | None, only_validates: bool = False) -> None:
        """Tell whose records follow; without it they are those of a run that begins.

        A log that is there is set aside if it is another run's, or if this run begins. Else the
        records of later steps, which a killed run left there, are removed, so that each step and
        each validation is logged once.

        Args:
            run: a number that no other run has; the first record names it.
            resumed: the step of the checkpoint from which the run goes on; None if it begins.
            only_validates: no step follows, so that all records stay but those of the validation
                and the evaluation that are made again.
        """
        self._run, self._resumed, self._only_validates = run, resumed, only_validates

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.out)
            self.out.flush()
        else:
            print(text, file=self.out, flush=True)

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Record a training step, with its values by tag: numbers, or texts by name."""
        self._record(step, values)
        self._show_progress(step, values)
        self.say(self._format_line(step, values))

    def validation(
        self,
        step: int,
        values: dict[str, float],
        sets: dict[str, dict[str, float]] | None = None,
        texts: list[dict[str, str]] | None = None,
    ) -> None:
        """Record a validation; tags get the prefix `val_`, and `val_<name>/` of a named set.

        Args:
            values: values by tag, over all sets.
            sets: the same for each named set.
            texts: prompts, references and the models' answers by name.
        """
        if texts:
            self._record(step, {"val_samples": texts})
        record = {f"val_{tag}": value for tag, value in values.items()}
        for name, part in (sets or {}).items():
            # Names hold no slash, so that no set can take the tags of another or of the mean.
            record |= {f"val_{name}/{tag}": value for tag, value in part.items()}
        self._record(step, record)
        self.say(f"validation after step {step}: {_show(values)}")
        for name, part in (sets or {}).items():
            self.say(f"  {name}: {_show(part)}")

    def evaluation(self, step: int, found: dict[str, dict[str, Estimate]]) -> None:
        """Record an evaluation: the metrics of each task by its name, as `eval_<task>/<metric>`,
        and the ends of their intervals as `…_low` and `…_high`."""
        record: dict[str, float] = {}
        for name, part in found.items():
            for tag, each in part.items():
                whole = f"eval_{name}/{tag}"
                record |= {whole: each.value, f"{whole}_low": each.low, f"{whole}_high": each.high}
        self._record(step, record)
        for name, part in found.items():
            shown = "  ".join(
                f"{tag} {each.value:.4f} [{each.low:.4f}, {each.high:.4f}]"
                for tag, each in part.items()
            )
            self.say(f"evaluation after step {step}: {name}  {shown}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None and self._settings:
            self._try(_EVENTS, write_settings, self._writer, self._settings, True)
        for name, sink in ((self._path, self._file), (_EVENTS, self._writer)):
            if sink is not None:
                self._try(name, sink.close)
        if self._wandb is not None:
            self._wandb.finish()

    def _open(self, path: Path, step: int, place: float) -> None:
        """Open the files for a run whose first record is of `step` and stands at `place`."""
        if self._resumed is None:
            _set_aside(path)
        else:
            # Steps that are skipped have no record, so that the first one may be of a later step.
            place = min(place, self._resumed + 1)
            lines = self._read_own(path, place)
            kept = [line for line in lines if _read_place(line) < place]
            if kept != lines:
                _replace(path, kept)
        # Line-buffered, so that a killed run keeps every record that it logged.
        self._file = path.open("a", buffering=1, encoding="utf-8")
        # TensorBoard drops the later steps of earlier event files from `purge_step` on.
        self._open_events(path, step, math.ceil(place) if step else 0)

    def _open_events(self, path: Path, step: int, purge_step: int | None) -> None:
        if self._events:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path.parent), purge_step=purge_step)
            threading.excepthook = functools.partial(_ignore_writer_thread, threading.excepthook)
            self._writer.add_text("config", f"```yaml\n{self._config_text}\n```", step)
            if self._settings:
                write_settings(self._writer, self._settings, has_ended=False)

    def _read_own(self, path: Path, place: float) -> list[str]:
        """Return the lines of this run's log. A log that names another run, or that names none and
        has no record before `place`, is set aside and said."""
        text = path.read_text(errors="replace", encoding="utf-8") if path.is_file() else ""
        lines = text.splitlines(keepends=True)
        owner = _find_run(lines)
        has_earlier = any(_read_place(line) < place for line in lines)
        is_ours = has_earlier if owner is None else owner == self._run
        if is_ours or not lines:
            return lines
        if (aside := _set_aside(path)) is not None:
            self.say(f"{path} was the log of another run; it is now {aside.name}")
        return []

    def _insert(self, path: Path, step: int, values: dict[str, Any]) -> None:
        """Put a record where it stands among others, in place of an earlier start's."""
        place = _place_record(step, values)
        lines = [line for line in self._read_own(path, math.inf) if line.endswith("\n")]
        if not self._inserted:
            self._open_events(path, step, None)
        if place not in self._inserted:
            lines = [line for line in lines if _read_place(line) != place]
        self._inserted.add(place)
        index = next((k for k, line in enumerate(lines) if _read_place(line) > place), len(lines))
        lines.insert(index, self._format_record(step, values, names_run=not lines))
        _replace(path, lines)

    def _format_record(self, step: int, values: dict[str, Any], names_run: bool) -> str:
        named = {"run": self._run} if names_run and self._run is not None else {}
        return json.dumps({"step": step, **named, **values}) + "\n"

    def _record(self, step: int, values: dict[str, Any]) -> None:
        path, is_first = self._path, self._file is None
        if path is not None and self._only_validates and self._resumed is not None:
            self._try(path, self._insert, path, step, values)
        elif path is not None and self._file is None:
            self._try(path, lambda: self._open(path, step, _place_record(step, values)))
        if self._file is not None:
            line = self._format_record(step, values, is_first)
            self._try(path, functools.partial(self._file.write, line))
        if self._writer is not None and not self._try(_EVENTS, self._draw, step, values):
            self._writer = None  # its writing thread has ended
        if self._wandb is not None:
            told = {tag: str(v) if isinstance(v, list) else v for tag, v in values.items()}
            self._wandb.log(told, step=step)

    def _draw(self, step: int, values: dict[str, Any]) -> None:
        for tag, value in values.items():
            if isinstance(value, list):
                self._writer.add_text(tag, format_texts(value), step)
            else:
                self._writer.add_scalar(tag, value, step)
        if not self._tags.issuperset(values):  # the first step, the first validation
            self._tags.update(values)
            self._writer.add_custom_scalars(choose_charts(self._tags))

    def _try(self, name: Any, write: Callable[..., Any], *arguments: Any) -> bool:
        """Call `write` and return whether it succeeded. A full disk does not end a run: the first
        failure of each destination is reported, and later records are dropped."""
        try:
            write(*arguments)
        except OSError as error:
            if name not in self._reported:
                self.say(f"{name} cannot be written ({first_line(error)}); training goes on")
            self._reported.add(name)
            return False
        return True

    def _show_progress(self, step: int, values: dict[str, float]) -> None:
        """Move the progress bar to a step, on a terminal alone."""
        if self._bar is None and self._first_step is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total_steps, initial=step - 1, unit="step", leave=False,
                dynamic_ncols=True, file=sys.stderr,
            )  # fmt: skip
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{values['train_loss']:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def _format_line(self, step: int, v: dict[str, float]) -> str:
        width = len(str(self.total_steps))
        losses = "  ".join(
            f"{label} {v[tag]:8.4f}"
            for label, tag in (("loss", "train_loss"), ("ce", "ce_loss"), ("kd", "kd_loss"))
            if tag in v
        )
        return (
            f"step {step:>{width}}/{self.total_steps}  {losses}  lr {v['learning_rate']:.2e}  "
            f"grad {v['grad_norm']:8.3f}  {v['tokens_per_sec']:8.0f} tok/s  "
            f"left {self._estimate_time_left(step)}"
        )

    def _estimate_time_left(self, step: int) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started = step, now
            return "  --:--"
        seconds = (now - self._started) / (step - self._first_step) * (self.total_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"


def _ignore_writer_thread(others: Callable[[Any], Any], ended: Any) -> None:
    """Print no traceback of TensorBoard's writing thread, whose error `add_scalar` raises again."""
    if type(ended.thread).__name__ != "_AsyncWriterThread":
        others(ended)


def _show(values: dict[str, float]) -> str:
    """Return the values of a validation that the console shows."""
    labels = {"loss": "loss", "ce_loss": "ce", "kd_loss": "kd", "hidden_loss": "hidden"}
    labels["top1_agreement"] = "top-1 agreement"
    shown = (f"{labels[tag]} {values[tag]:.4f}" for tag in labels if tag in values)
    return "  ".join(shown)


def _replace(path: Path, lines: list[str]) -> None:
    """Write the lines of a log anew, atomically."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(lines), "utf-8")
    aside.replace(path)


def _set_aside(path: Path) -> Path | None:
    """Rename a log to a free name beside it, and return that, or None if nothing is logged."""
    if not path.is_file() or not path.stat().st_size:
        return None
    names = (f"{path.stem}.before{number}{path.suffix}" for number in itertools.count(1))
    return path.rename(next(p for p in map(path.with_name, names) if not os.path.lexists(p)))


def _find_run(lines: list[str]) -> int | None:
    """Return the run that has written last into a log, or None if its records do not tell, as those
    of earlier versions."""
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            if '"run"' in line and isinstance(record := json.loads(line), dict):
                return record.get("run")
    return None


def _place_record(step: int, values: dict[str, Any]) -> float:
    """Return the position of a record in a log: a step comes before its validation, and that before
    its evaluation."""
    if any(name.startswith("eval_") for name in values):
        return step + 0.75
    return step + 0.5 * any(name.startswith("val_") for name in values)


def _read_place(line: str) -> float:
    """Return the position of a line of a log, or infinity for a line that is no record."""
    try:
        record = json.loads(line)
        return _place_record(record["step"], record) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
