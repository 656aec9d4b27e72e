"""How to spend a budget of compute: by a law of N and D, and by the lowest points of IsoFLOP profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.lab.scaling.law import Law
from llm_jax.lab.scaling.runs import Runs

PROFILE = 1.2  # most compute of an IsoFLOP profile over its least
SIZES = 3  # different ones that a profile needs, whose largest is at least WIDE times the smallest
WIDE = 1.5


@dataclass(frozen=True)
class Compute:
    """FLOPs a token as a multiple of 6N, over log N: that of the runs, counted exactly, and between their sizes interpolated.

    Beyond them it is that of the nearest. 6N alone leaves out attention, which small models spend half of their compute on.
    """

    log_N: np.ndarray
    ratio: np.ndarray

    @classmethod
    def of(cls, runs: Runs) -> Compute:
        """As it was in these runs."""
        sizes, place = np.unique(runs.N, return_inverse=True)
        ratio = runs.C / (6 * runs.N * runs.D)
        return cls(np.log(sizes), np.array([ratio[place == i].mean() for i in range(len(sizes))]))

    def per_token(self, N: np.ndarray | float) -> np.ndarray:
        """FLOPs to train on one token."""
        return 6 * np.asarray(N) * np.interp(np.log(N), self.log_N, self.ratio)


def optimum(law: Law, compute: Compute, budget: float) -> tuple[float, float, float]:
    """N and D of the least loss for so many FLOPs, and that loss, by a law of N and D: a search over log N, finer and finer."""
    low, high = np.log(1.0), np.log(budget / 6)
    for _ in range(4):
        log_N = np.linspace(low, high, 200)
        D = budget / compute.per_token(np.exp(log_N))
        loss = law(np.column_stack([np.exp(log_N), D]))
        best, step = int(np.argmin(loss)), log_N[1] - log_N[0]
        low, high = log_N[best] - 2 * step, log_N[best] + 2 * step
    return float(np.exp(log_N[best])), float(D[best]), float(loss[best])


# ── IsoFLOP profiles (Hoffmann et al. 2022, approach 2) ───────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Profile:
    """Runs of about equal compute. C: their mean; curve: of the parabola of the loss in log N, highest power first; N, D: at its
    lowest point, None where that lies outside of the sizes that were trained, or there is none."""

    C: float
    members: tuple[int, ...]
    curve: tuple[float, float, float]
    N: float | None
    D: float | None


def profiles(runs: Runs, compute: Compute) -> list[Profile]:
    """The IsoFLOP profiles among the runs, from the least compute to the most; empty unless there are two."""
    order = np.argsort(runs.C)
    groups: list[list[int]] = []
    for i in order:
        if groups and runs.C[i] <= PROFILE * runs.C[groups[-1][0]]:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    found = [_profile(runs, group, compute) for group in groups if _is_profile(runs.N[group])]
    return found if len(found) > 1 else []


def _is_profile(N: np.ndarray) -> bool:
    return len(np.unique(N)) >= SIZES and N.max() >= WIDE * N.min()


def _profile(runs: Runs, group: Sequence[int], compute: Compute) -> Profile:
    log_N, C = np.log(runs.N[group]), float(np.exp(np.log(runs.C[group]).mean()))
    curve = np.polyfit(log_N, runs.loss[group], 2)
    lowest = -curve[1] / (2 * curve[0])
    inside = curve[0] > 0 and log_N.min() <= lowest <= log_N.max()
    N = float(np.exp(lowest)) if inside else None
    return Profile(C, tuple(group), tuple(curve.tolist()), N, None if N is None else float(C / compute.per_token(N)))


def power(profiles: Sequence[Profile]) -> tuple[float, float] | None:
    """k and a of N = k · C^a through the profiles' lowest points; None where fewer than two have one."""
    known = [(np.log(each.C), np.log(each.N)) for each in profiles if each.N is not None]
    if len(known) < 2:
        return None
    a, log_k = np.polyfit(*np.transpose(known), 1)
    return float(np.exp(log_k)), float(a)
