"""The results of an evaluation as a table and as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_kd.evaluate.comparison import shorten
from ds_kd.evaluate.statistics import Metric, estimate, estimate_difference
from ds_kd.evaluate.tasks.kinds import Record
from ds_kd.writing import write_text

_DIGITS = 4


@dataclass(frozen=True)
class Evaluated:
    """A model's records of a task.

    Args:
        model: its directory or hub id.
        records: one for each sample that has something to score.
        rows: the row of each, from 0.
        total: number of rows.
    """

    model: str
    records: list[Record]
    rows: list[int]
    total: int


def summarize(
    task: str, metrics: Sequence[Metric], evaluated: list[Evaluated], about: dict[str, Any]
) -> dict[str, Any]:
    """Return the results as JSON: each model's metrics with 95 % intervals, and the differences of
    every two models that could score the same samples, in the metrics that compare them.

    Args:
        task: its name.
        about: what else the results should say of themselves.
    """
    models, differences = [], []
    for each in evaluated:
        found = {metric.name: asdict(estimate(metric, each.records)) for metric in metrics}
        counts = {"samples": len(each.records), "rows": each.total}
        models.append({"model": each.model, **counts, "metrics": found})

    # A paired difference needs the same samples.
    for first, second in itertools.combinations(evaluated, 2):
        if first.rows == second.rows:
            pair = second.records, first.records
            found = {
                metric.name: asdict(estimate_difference(metric, *pair))
                for metric in metrics
                if _divide_alike(metric, *pair)
            }
            names = {"model": second.model, "minus": first.model}
            differences.append({**names, "metrics": found})
    return {"task": task, **about, "models": models, "differences": differences}


def _divide_alike(metric: Metric, records: list[Record], others: list[Record]) -> bool:
    """Return whether both models' sums are divided by the same number for each sample. Other
    tokenizers make other tokens, and means over these are not to be compared."""
    return bool(np.array_equal(metric.read(records)[1], metric.read(others)[1]))


def format_table(results: dict[str, Any], metrics: Sequence[Metric]) -> str:
    """Return the results as a text of aligned columns."""
    names = [metric.name for metric in metrics]
    rows = [["", *(f"{m.name} {'↓' if m.is_lower_better else '↑'}" for m in metrics)]]
    labels = shorten([each["model"] for each in results["models"]])
    for each in results["models"]:
        rows.append([labels[each["model"]], *(_show(each["metrics"][name]) for name in names)])
    for each in results["differences"]:
        label = f"{labels[each['model']]} − {labels[each['minus']]}"
        rows.append([label, *(_show(each["metrics"].get(name), "+") for name in names)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]

    first = results["models"][0]
    told = f"{results['task']}: {first['samples']} samples"
    if first["samples"] < first["rows"]:
        told += f" ({first['rows'] - first['samples']} more rows have nothing to score)"
    return "\n".join([f"{told}, 95 % bootstrap intervals", *(line.rstrip() for line in lines)])


def _show(value: dict[str, float] | None, sign: str = "") -> str:
    if value is None:
        return "—"
    middle = f"{value['value']:{sign}.{_DIGITS}f}"
    return f"{middle} [{value['low']:{sign}.{_DIGITS}f}, {value['high']:{sign}.{_DIGITS}f}]"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the results, all of them or none.

    Raises:
        OSError: they cannot be written; names the file.
    """
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
