"""Whose turn it is: which of several sources each example of training comes from, a function of its running number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import ConfigError

STAGES = 1024  # of training, in each of which shares that change are constant


@dataclass(frozen=True)
class Apportionment:
    """Shares of the examples. times `[M + 1]`: running numbers; shares `[M + 1, S]`: examples due of each source by then.

    The k-th example of a source is due when its share reaches k + ½, and all are taken as they are due: after any number of
    examples each of S sources has had its share to within (1 + S) / 2.
    """

    times: np.ndarray
    shares: np.ndarray

    @property
    def sources(self) -> int:
        """How many there are."""
        return self.shares.shape[1]

    def turns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the examples numbered `start` to before `stop`: the source `[n]`, and which of the source's own it is `[n]`."""
        if self.sources == 1:
            return np.zeros(stop - start, np.int64), np.arange(start, stop)
        slack = self.sources + 2  # by which the number due can differ from the number taken
        before, until = (self._due(max(at, 0.0)) for at in (start - slack, stop + slack))
        source = np.repeat(np.arange(self.sources), until - before)
        number = np.concatenate([np.arange(*pair) for pair in zip(before, until, strict=True)])
        when = np.empty(len(number))
        for one in range(self.sources):
            when[source == one] = self._when(one, number[source == one])
        order = np.lexsort((source, when))[start - before.sum() :][: stop - start]
        return source[order], number[order]

    def taken(self, count: int) -> np.ndarray:
        """`[S]`: about how many of the first `count` examples are of each source."""
        return self._due(float(count))

    def _due(self, time: float) -> np.ndarray:
        last = (self.shares[-1] - self.shares[-2]) / (self.times[-1] - self.times[-2])
        found = [np.interp(time, self.times, share) for share in self.shares.T]
        due = np.array(found) + last * max(time - self.times[-1], 0.0)
        return np.floor(due - 0.5).astype(np.int64) + 1  # so many k with k + ½ <= due; due + ½ might be rounded up

    def _when(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """When a source's own examples are due: as soon as its share is, also where it stays so for a while."""
        share, wanted = self.shares[:, source], numbers + 0.5
        stage = np.clip(np.searchsorted(share, wanted, "left"), 1, len(share) - 1)  # the last one goes on for ever
        begin, rise = share[stage - 1], share[stage] - share[stage - 1]
        within = np.divide(wanted - begin, rise, out=np.zeros_like(wanted), where=rise > 0)
        return self.times[stage - 1] + within * (self.times[stage] - self.times[stage - 1])


ALONE = Apportionment(np.array([0.0, 1.0]), np.array([[0.0], [1.0]]))


def apportion(weights: Sequence[Callable[[float], float]], limits: Sequence[float], total: int, *, changing: bool) -> Apportionment:
    """The shares of `total` examples. weights: of each source after that fraction of training; limits: examples of each, at most.

    What one that is used up would have had goes to the others, in proportion. changing: whether any weight depends on the fraction.
    Raises `ConfigError` where all are used up before the end.
    """
    limits_S, due = np.array(limits, np.float64), np.zeros(len(weights))
    if not changing and np.isinf(limits_S).all():
        total = 1  # the same order however long training is
    times, shares = [0.0], [due]
    for stage in range(STAGES if changing else 1):
        end = total * (stage + 1) / (STAGES if changing else 1)
        given = np.array([weight((stage + 0.5) / STAGES if changing else 0.0) for weight in weights], np.float64)
        while times[-1] < end:
            alive = np.where(due < limits_S, given, 0.0)
            if not alive.any():
                used_up = f"are used up after {int(times[-1]):,} of {total:,} rows: allow more epochs, or take fewer train.steps"
                told = used_up if (due >= limits_S).any() else "have no weight at all at some time"
                raise ConfigError(told, "the mixture's sources")
            rate = alive / alive.sum()
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.where(rate > 0, (limits_S - due) / rate, np.inf)
            step = min(end - times[-1], room.min())
            due = np.where(room <= step, limits_S, due + rate * step)
            times.append(times[-1] + step if step < end - times[-1] else end)
            shares.append(due)
    return Apportionment(np.array(times), np.array(shares))
