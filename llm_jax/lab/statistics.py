"""What a difference between arms is worth: intervals over seeds, paired tests, and verdicts that may say "no difference"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.05  # of every test and interval

Verdict = Literal["better", "worse", "no detectable difference", "not tested"]


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; None of fewer than two."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return None
    mean, half = float(x.mean()), _half_width(x)
    return mean - half, mean + half


def _half_width(x: np.ndarray) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


@dataclass(frozen=True)
class Difference:
    """mean of the paired differences, its Student-t interval, and the two-sided p value; None where n < 2 leaves no inference."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    pairs: int


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], *, shift: float = 0.0) -> Difference | None:
    """a - b over the seeds both have (seed → value), tested against `shift` by a paired t test; None without a common seed."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    x = np.array([a[s] - b[s] for s in seeds], np.float64)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Difference(mean, None, None, None, n)
    error = float(x.std(ddof=1)) / np.sqrt(n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == shift else 0.0, n)
    half = _half_width(x)
    p = 2 * float(stats.t.sf(abs(mean - shift) / error, n - 1))
    return Difference(mean, mean - half, mean + half, p, n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted for their number (Holm 1979); None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def verdict(difference: Difference | None, adjusted: float | None, *, sign: int) -> Verdict:
    """What an adjusted p value says of a difference; sign is +1 where less is better, -1 where more is."""
    if difference is None or adjusted is None:
        return "not tested"
    if adjusted >= LEVEL:
        return "no detectable difference"
    return "better" if sign * difference.mean < 0 else "worse"


@dataclass(frozen=True)
class NoiseFloor:
    """deviation: from seed to seed, pooled over arms; detectable: the smallest paired difference found with 80% power."""

    deviation: float
    detectable: float | None
    seeds: int


def noise_floor(arms: Sequence[Sequence[float]], *, power: float = 0.8, tests: int = 1) -> NoiseFloor | None:
    """The pooled seed-to-seed deviation, and what so many seeds can detect, taking pairs as independent; None without two seeds.

    The detectable difference solves P(|t| > t_crit) = power for a noncentral t with n - 1 degrees of freedom, at the level
    that the first of so many `tests` must reach by Holm's rule.
    """
    groups = [np.asarray(g, np.float64) for g in arms if len(g) >= 2]
    if not groups:
        return None
    freedom = sum(len(g) - 1 for g in groups)
    deviation = float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom))
    n = max(len(g) for g in groups)
    critical = stats.t.ppf(1 - LEVEL / tests / 2, n - 1)
    shifts = np.linspace(0, 60, 6001)
    reached = np.nan_to_num(stats.nct.sf(critical, n - 1, shifts), nan=1.0) >= power
    shift = float(shifts[np.argmax(reached)]) if reached.any() else None
    return NoiseFloor(deviation, None if shift is None else shift * deviation * float(np.sqrt(2 / n)), n)


def claim_verdict(difference: Difference | None, adjusted: float | None, *, by: float, sign: int) -> str:
    """One of supported, refuted, inconclusive: whether `better` - `than` lies significantly beyond `by`, and on which side."""
    if difference is None or adjusted is None or adjusted >= LEVEL:
        return "inconclusive"
    return "supported" if sign * difference.mean < -by else "refuted"
