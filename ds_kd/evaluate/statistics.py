"""Metrics as ratios of sums over samples, and how sure they are: bootstrap intervals.

A bootstrap draws as many samples as there are, with replacement, many times, and looks at how much
a metric moves. The same samples are drawn of two models, so that their difference is paired: what
makes a sample hard for both of them drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 1000
_COVERAGE = 0.95
_SEED = 0
_BLOCK = 1 << 20  # samples drawn at one time


@dataclass(frozen=True)
class Metric:
    """A metric of a task: `finish(Σ total / Σ per)` over its samples.

    Args:
        name: its name in the results.
        total: the field of a sample's record that is summed.
        per: the field by which that sum is divided; by default the number of samples.
        finish: computes the metric from that mean, elementwise.
        is_lower_better: whether less of it is better.
    """

    name: str
    total: str
    per: str = ""
    finish: Callable[[Any], Any] = lambda mean: mean
    is_lower_better: bool = False

    def read(self, records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the summed and the dividing value of every record, in fp64."""
        total = np.array([record[self.total] for record in records], dtype=np.float64)
        per = [record[self.per] if self.per else 1.0 for record in records]
        return total, np.array(per, dtype=np.float64)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(metric: Metric, records: Sequence[dict[str, Any]]) -> Estimate:
    """Return a metric of a model's records, one for each sample."""
    return _describe(compute(metric, records), _resample(metric, records))


def estimate_difference(
    metric: Metric, records: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> Estimate:
    """Return by how much a metric of the first records exceeds that of others of the same
    samples."""
    value = compute(metric, records) - compute(metric, others)
    return _describe(value, _resample(metric, records) - _resample(metric, others))


def compute(metric: Metric, records: Sequence[dict[str, Any]]) -> float:
    """Return a metric of records, one for each sample."""
    total, per = metric.read(records)
    return float(metric.finish(total.sum() / per.sum()))


def _resample(metric: Metric, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the metric of `DRAWS` draws; the same draws for every metric and model."""
    total, per = metric.read(records)
    count, draw = len(total), np.random.default_rng(_SEED)
    at_once = max(1, _BLOCK // count)
    means = []
    for start in range(0, DRAWS, at_once):
        chosen = draw.integers(0, count, size=(min(at_once, DRAWS - start), count))
        # A draw may consist of samples without a token; it says nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            means.append(total[chosen].sum(1) / per[chosen].sum(1))
    return np.asarray(metric.finish(np.concatenate(means)))


def _describe(value: float, draws: np.ndarray) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Estimate(value, value, value)
    tail = 50 * (1 - _COVERAGE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
