"""Read what a run has left: its log, and the YAML beside its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ds_kd.errors import UserError
from ds_kd.evaluate.comparison import read_lines
from ds_kd.files import parse_json, read_plain_file

_LOG = "metrics.jsonl"
_LARGEST = 100_000_000  # bytes of a YAML or of an evaluation's results


class ReportError(UserError):
    """A directory holds no run, or the page cannot be written."""

    exit_code = 2


@dataclass(frozen=True)
class Run:
    """A run of which a page tells.

    Args:
        name: the directory, as the user gave it.
        records: of its log, in order.
        settings: its YAML's values by dotted name; empty where no checkpoint holds one.
        config: the YAML itself.
    """

    name: str
    records: list[dict[str, Any]]
    settings: dict[str, Any]
    config: str

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a tag."""
        points = [(r["step"], r[tag]) for r in self.records if tag in r]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, tag: str) -> Any:
        """Return the last value of a tag, or None."""
        return next((r[tag] for r in reversed(self.records) if tag in r), None)

    def first(self, tag: str) -> Any:
        return next((r[tag] for r in self.records if tag in r), None)

    def list_evaluations(self) -> dict[str, dict[str, float]]:
        """Return the last value of each metric of each task by `task, metric`, with the ends of its
        interval, `low` and `high`, where the log has them."""
        found = {}
        for tag in dict.fromkeys(tag for record in self.records for tag in record):
            name = tag.removeprefix("eval_")
            if name == tag or tag.endswith(("_low", "_high")):
                continue
            ends = {end: self.last(f"{tag}_{end}") for end in ("low", "high")}
            kept = {end: value for end, value in ends.items() if value is not None}
            found[name.replace("/", ", ")] = {"value": self.last(tag), **kept}
        return found

    def measure_cost(self) -> dict[str, float]:
        """Return what the run took, by name with its unit; parts that its log does not tell are
        left out."""
        steps = [r for r in self.records if "time/step" in r and "tokens_per_sec" in r]
        if sum(r["time/step"] for r in steps) <= 0:
            return {}
        other = ("time/validation", "time/checkpoint")
        seconds = sum(r["time/step"] for r in steps)
        memory = [v for r in steps for tag, v in r.items() if tag.startswith("memory")]
        ranks = sum(tag.startswith("memory/") for tag in steps[-1])
        tera = sum(r["time/step"] * r.get("throughput/tflops_per_rank", 0.0) for r in steps)
        cost = {
            "steps": float(len(steps)),
            "training, minutes": seconds / 60,
            "validation and checkpoints, minutes": sum(r.get(n, 0) for r in steps for n in other)
            / 60,
            "tokens": sum(r["time/step"] * r["tokens_per_sec"] for r in steps),
            "tokens per second": sum(r["time/step"] * r["tokens_per_sec"] for r in steps) / seconds,
            "ranks": float(ranks),
            "peak memory of a rank, GiB": max(memory, default=0.0),
        }
        return cost | ({"10¹⁵ operations, all ranks": tera * ranks / 1000} if tera else {})


def read_run(directory: Path) -> Run:
    """Return the run of a checkpoint directory, or of a directory with a log.

    Raises:
        ReportError: there is no log, or it is empty or damaged.
    """
    beside = [directory / name for name in ("LATEST/config.yaml", "BEST/config.yaml")]
    config = next((path for path in beside if path.is_file()), None)
    text = "" if config is None else read_plain_file(config, _LARGEST).decode(errors="replace")
    settings = _flatten(_load(text))

    # The log may be where the YAML put it, or both were copied from elsewhere.
    logs = [directory / "tensorboard" / _LOG, directory / _LOG]
    if named := settings.get("tensorboard.log_dir"):
        logs.insert(0, Path(str(named)) / _LOG)
    log = next((path for path in logs if path.is_file()), None)
    if log is None:
        raise ReportError(
            f"{directory}: no run there: no {_LOG} in it or in its tensorboard/; give a run's "
            f"checkpoint_dir, or its tensorboard.log_dir"
        )
    try:
        records = [r for r in read_lines(log) if isinstance(r, dict) and "step" in r]
    except (UserError, UnicodeDecodeError) as error:
        raise ReportError(f"{log}: damaged: {error}") from error
    if not records:
        raise ReportError(f"{log}: nothing is logged yet")
    return Run(str(directory), records, settings, text)


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the results that `launch/evaluate.py --output` has written.

    Raises:
        ReportError: there are none in this file.
    """
    try:
        found = parse_json(read_plain_file(path, _LARGEST))
        # All that the page shows is there.
        _ = found["task"], found["models"][0]["samples"]
        for each in (*found["models"], *found["differences"]):
            _ = each["model"]
            for metric in each["metrics"].values():
                _ = [math.isfinite(metric[name]) for name in ("value", "low", "high")]
    except OSError as error:
        raise ReportError(f"--evaluation {path}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ReportError(
            f"--evaluation {path}: holds no results; give a file that launch/evaluate.py --output "
            f"has written"
        ) from error
    return dict(found)


class _WithoutAliases(yaml.SafeLoader):
    """A loader that refuses aliases, which no run writes and which may multiply without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _load(text: str) -> Any:
    try:
        return yaml.load(text, _WithoutAliases)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name."""
    if not isinstance(tree, dict):
        return {}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def find_differences(runs: list[Run]) -> dict[str, list[str]]:
    """Return the settings in which runs differ, by name, a text for each run; where a run is saved
    and logged is no difference."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    found = {name: [str(run.settings.get(name, "—")) for run in runs] for name in names}
    places = ("checkpoint.checkpoint_dir", "tensorboard.log_dir")
    return {n: v for n, v in found.items() if len(set(v)) > 1 and n not in places}
