"""Going back from where training went wrong, and on past the batches that it went wrong on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from llm_jax.core.config import require, require_positive
from llm_jax.core.types import Batch
from llm_jax.train.guard import Guard, Watch
from llm_jax.train.incidents import Incidents

TYPICAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST = 0.01  # of the median: what losses are taken to vary by at least

Gap = tuple[int, int]  # batches from one number to before another


class Diverged(Exception):
    """Training went wrong more often than its guard was to go back."""


@dataclass(frozen=True)
class RollBack(Guard):
    """Where a record's loss is not finite, or far above the last ones', training goes back to a checkpoint and leaves batches out.

    So Chowdhery et al. 2022 (PaLM, §5.1) got past spikes: back by about 100 steps, and past 200 to 500 batches. Here they are left
    out from `before` steps before the last good record to `after` steps behind the bad one, and those before are trained on again.
    The number of updates stays; the data are read on. deviations: how many are too far above the median of the last `window`
    records, in median absolute deviations, scaled to be standard ones of a normal distribution; times: how often to go back before
    training fails. A trial has a program of its own, so that no other leaves out what it need not.
    """

    deviations: float = 10.0
    window: int = 16
    before: int = 100
    after: int = 100
    times: int = 3

    def validate(self):
        require_positive(self, "deviations", "times")
        require(self.window >= 4, "window", f"must be >= 4 records, got {self.window}")
        for name in ("before", "after"):
            require(getattr(self, name) >= 0, name, f"must be >= 0, got {getattr(self, name)}")

    @property
    def alone(self):
        return True

    def watch(self, incidents):
        return _GoingBack(self, incidents)

    def is_bad(self, loss: float, known: Sequence[float]) -> bool:
        """Whether a loss is not finite, or a spike above those known, of which there are enough."""
        if not math.isfinite(loss) or len(known) < self.window // 2:
            return not math.isfinite(loss)
        median = float(np.median(known))
        usual = max(TYPICAL * float(np.median(np.abs(np.array(known) - median))), LEAST * abs(median))
        return loss > median + self.deviations * usual


class _GoingBack(Watch):
    """Sees spikes, and knows which batches are left out."""

    def __init__(self, guard: RollBack, incidents: Incidents):
        self.guard, self.incidents, self.gaps = guard, incidents, list[Gap]()
        self.known, self.last, self.dispatch = deque[float](maxlen=guard.window), 0, 1
        self.waiting: dict[str, Any] | None = None  # to be written down once later checkpoints are gone: they know nothing of it

    def rewind(self, step):
        self.incidents.drop_from(math.inf)
        if self.waiting is not None:
            self.incidents.write(0, "rolled back", **self.waiting)
            self.waiting = None
        rows = [row for row in self.incidents.records(0) if row.get("train/loss") is not None]
        self.known = deque([row["train/loss"] for row in rows], self.guard.window)
        self.last = max([row["step"] for row in rows], default=0)
        self.gaps = merged([tuple(line["left_out"]) for line in self._before()])

    def _before(self) -> list[dict[str, Any]]:
        return [line for line in self.incidents.read(0) if "left_out" in line]

    def feed(self, feed, step, dispatch):
        self.dispatch = dispatch
        return past(self.gaps, feed, step, dispatch)

    def look(self, step, rows, state, losses, saved):
        loss, each = rows[0]["train/loss"], self.dispatch
        if not self.guard.is_bad(loss, self.known):
            self.known.append(loss)
            self.last = step
            return None
        times = len(self._before())
        if times >= self.guard.times:
            told = f"the loss at step {step} is {loss:.4g} after training went back {times} times, which is all it may"
            raise Diverged(f"{told}: lower optimizer.learning_rate, or raise train.guard.times (see incidents.jsonl)")
        wanted, known = max(self.last - self.guard.before, 0), sorted(s for s in saved() if s <= self.last)
        to = max((s for s in known if s <= wanted), default=min(known, default=0))
        first, until = max(wanted, to) // each * each, -(-(step + self.guard.after) // each) * each
        gap = number(first, self.gaps), number(until, self.gaps)
        worst = step - (len(losses) - _worst(losses)) * each
        self.waiting = {"step": worst, "batch": number(worst, self.gaps), "steps": each, "loss": loss, "found_at": step}
        self.waiting |= {"back_to": to, "left_out": list(gap)}
        self.incidents.say(0, f"the loss at step {step} is {loss:.4g}: back to step {to}, without batches {gap[0]} to {gap[1] - 1}")
        return to


def _worst(losses: Sequence[np.ndarray]) -> int:
    """The first that is not finite, or else the largest."""
    return int(np.argmax([np.inf if not np.isfinite(x[0]) else x[0] for x in losses]))


def merged(gaps: Sequence[Gap]) -> list[Gap]:
    """The same batches as gaps in order that do not touch."""
    found: list[Gap] = []
    for start, stop in sorted(gaps):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def number(step: int, gaps: Sequence[Gap]) -> int:
    """The number of the batch that step `step` (from 0) trains on, where those in the gaps are left out."""
    for start, stop in gaps:
        step += stop - start if step >= start else 0
    return step


def past(gaps: Sequence[Gap], feed: Callable[[int], Iterator[Batch]], step: int, dispatch: int) -> Iterator[Batch]:
    """Batches from that of step `step` on without those in the gaps, whose ends are multiples of `dispatch`."""
    at = number(step, gaps)
    for start, stop in gaps:
        if start >= at:
            yield from islice(feed(at), (start - at) // dispatch)
            at = stop
    yield from feed(at)
