"""What a score over a sample of documents or questions is worth: its standard error and a 95% interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A score of `count` documents or questions. error: its standard error, nan of fewer than two; low, high: the interval."""

    value: float
    error: float
    low: float
    high: float
    count: int

    def transformed(self, function: Callable[[float], float], slope: float) -> Estimate:
        """The same of an increasing function of it, whose derivative at the value is `slope` (the delta method)."""
        return Estimate(function(self.value), slope * self.error, function(self.low), function(self.high), self.count)


def proportion(hits: Sequence[bool] | np.ndarray) -> Estimate:
    """The share of hits. Its error is that of a mean, √(p(1-p) / (n-1)); its interval is Wilson's (1927), which stays in [0, 1]."""
    count, total = len(hits), int(np.sum(hits))
    p = total / count
    interval = stats.binomtest(total, count).proportion_ci(LEVEL, "wilson")
    error = math.sqrt(p * (1 - p) / (count - 1)) if count > 1 else math.nan
    return Estimate(p, error, float(interval.low), float(interval.high), count)


def reported(value: float, error: float, count: int) -> Estimate:
    """What another library says of a score: as `proportion` has it where its error is that of one, or else normal."""
    if count > 1 and 0 <= value <= 1 and math.isclose(error, math.sqrt(value * (1 - value) / (count - 1)), rel_tol=1e-6):
        interval = stats.binomtest(round(value * count), count).proportion_ci(LEVEL, "wilson")
        return Estimate(value, error, float(interval.low), float(interval.high), count)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    return Estimate(value, error, value - half, value + half, count)


@dataclass
class Sums:
    """Means and co-moments of `k` numbers of each document, added up as they come (Chan et al. 1979): nothing grows with them."""

    size: int
    count: int = 0
    mean: np.ndarray = field(init=False)
    moment: np.ndarray = field(init=False)

    def __post_init__(self):
        self.mean, self.moment = np.zeros(self.size), np.zeros((self.size, self.size))

    def add(self, values: Sequence[float]) -> None:
        """One more document."""
        self.count += 1
        apart = np.asarray(values, np.float64) - self.mean
        self.mean = self.mean + apart / self.count
        self.moment += np.outer(apart, np.asarray(values, np.float64) - self.mean)

    @property
    def totals(self) -> np.ndarray:
        """`[k]`: the sums over all documents."""
        return self.mean * self.count

    def ratio(self, over: int, under: int) -> Estimate:
        """Σ of one number / Σ of another, over documents drawn at random: Student's t, with the error of the ratio's linear part.

        error² = n / (n-1) · Σ (x - r·y)² / (Σ y)² (Cochran 1977, §6.4). No number is negative, and so the interval is not, though
        that of two documents, where t is 12.7, would often be.
        """
        under_mean = self.mean[under]
        r = self.mean[over] / under_mean
        if self.count < 2:
            return Estimate(r, math.nan, math.nan, math.nan, self.count)
        squares = self.moment[over, over] - 2 * r * self.moment[over, under] + r * r * self.moment[under, under]
        error = math.sqrt(max(squares, 0) / (self.count * (self.count - 1))) / abs(under_mean)
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.count - 1)) * error
        return Estimate(r, error, max(r - half, 0.0), r + half, self.count)
