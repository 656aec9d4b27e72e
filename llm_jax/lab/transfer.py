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
    """Tuning seed → log2 of the arm's best value, the other nuisance parameters at theirs; trials that diverged are none."""
    scores: dict[int, dict[float, float]] = {}
    for trial in trials:
        value = trial["metrics"].get(metric)
        if trial["arm"] == arm and trial["phase"] == "tune" and value is not None and path in trial["nuisance"]:
            own, x = scores.setdefault(trial["seed"], {}), math.log2(trial["nuisance"][path])
            own[x] = min(sign * value, own.get(x, math.inf))
    return {seed: lowest(own) for seed, own in scores.items()}


def lowest(points: Mapping[float, float]) -> float:
    """Where the parabola through the lowest point and its two neighbours is lowest; the point itself at an edge."""
    xs = sorted(points)
    i = min(range(len(xs)), key=lambda i: points[xs[i]])
    if i in (0, len(xs) - 1):
        return xs[i]
    near = np.array(xs[i - 1 : i + 2]) - xs[i]
    bend, slope, _ = np.polyfit(near, [points[x] for x in xs[i - 1 : i + 2]], 2)
    return float(xs[i] - slope / (2 * bend)) if bend > 0 else xs[i]
