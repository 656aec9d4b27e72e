"""How far the best value of a nuisance parameter moves from arm to arm: what µP says of learning rates (Yang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.lab.problems import Trial


def moves(trials: Sequence[Trial], arms: tuple[str, str], path: str, metric: str, *, sign: int) -> dict[int, float]:
    """Tuning seed → powers of two between the best values for the two arms, either way; sign: +1 where less is better."""
    first, second = (_best(trials, arm, path, metric, sign) for arm in arms)
    return {seed: abs(second[seed] - first[seed]) for seed in sorted(set(first) & set(second))}


def _best(trials: Sequence[Trial], arm: str, path: str, metric: str, sign: int) -> dict[int, float]:
    """Tuning seed → log2 of the arm's best value, the other nuisance parameters at theirs; none where it is the grid's last one."""
    scores: dict[int, dict[float, float]] = {}
    for trial in trials:
        if trial["arm"] == arm and trial["phase"] == "tune" and path in trial["nuisance"]:
            own, x, value = scores.setdefault(trial["seed"], {}), math.log2(trial["nuisance"][path]), trial["metrics"].get(metric)
            own[x] = min(math.inf if value is None else sign * value, own.get(x, math.inf))
    found = {seed: lowest(own) for seed, own in scores.items()}
    return {seed: x for seed, x in found.items() if x is not None}


def lowest(points: Mapping[float, float]) -> float | None:
    """Where the parabola through the lowest point and its neighbours is lowest, or the point itself beside one that diverged.

    None at an edge: what is best lies beyond it, nobody knows how far.
    """
    xs = sorted(points)
    i = min(range(len(xs)), key=lambda i: points[xs[i]])
    if i in (0, len(xs) - 1):
        return None
    near, values = np.array(xs[i - 1 : i + 2]) - xs[i], [points[x] for x in xs[i - 1 : i + 2]]
    if not np.isfinite(values).all():
        return xs[i]
    bend, slope, _ = np.polyfit(near, values, 2)
    return float(xs[i] - slope / (2 * bend)) if bend > 0 else xs[i]
