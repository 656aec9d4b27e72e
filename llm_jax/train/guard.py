"""What is done about updates that would do harm: nothing, or leave them out (`train.rollback`: or go back)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import Config, require, require_fraction, require_positive
from llm_jax.core.types import Batch, Metrics, Weighted
from llm_jax.train.incidents import Incidents

RECENT = 16  # updates that were left out, of which it is remembered which they were: more in one interval are only counted

Row = dict[str, float]
Losses = Sequence[np.ndarray]
Saved = Callable[[], Sequence[int]]


class Watch:
    """What the loop tells of a running training, a guard's part on the host; this one lets everything pass."""

    def rewind(self, step: int) -> None:
        """Training goes on after `step`; what was recorded later is gone."""

    def feed(self, feed: Callable[[int], Iterator[Batch]], step: int, dispatch: int) -> Iterator[Batch]:
        """The batches of a training that goes on after `step`, so many steps in each."""
        return feed(step)

    def look(self, step: int, rows: list[Row], state: Any, losses: Losses, saved: Saved) -> int | None:
        """Sees `rows` before they are recorded; returns the step to go back to, if that is needed. May raise.

        losses: `[members]` of each dispatch since the last record; saved: `() -> steps of the checkpoints`.
        """


@dataclass(frozen=True)
class Guard(Config):
    """What is done about updates that would do harm."""

    abstract = True

    @property
    def alone(self) -> bool:
        """Whether a trial must have a program of its own, since what is done about one would be done to all."""
        return False

    def start(self) -> Any:
        """What of the guard is part of a trial's state, if anything is."""

    def guarded(self, old: Any, new: Any, metrics: Metrics, *, loss: jax.Array, norm: jax.Array) -> tuple[Any, Metrics]:
        """The state after a step that would lead from `old` to `new`, and its metrics. loss, norm: the batch's, the gradient's."""
        return new, metrics

    def watch(self, incidents: Incidents) -> Watch:
        """Its part on the host."""
        return Watch()


@dataclass(frozen=True)
class NoGuard(Guard):
    """Every update is made. A trial whose loss is not finite at the end has diverged, and the others go on."""


# ── single updates ───────────────────────────────────────────────────────────────────────────────────────────────────
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """What a trial's updates were like. count: of them; mean, variance `[2]`: of loss and gradient norm.

    skipped: updates that were left out; steps, values: of the last of them, `[RECENT]` and `[RECENT, 2]`, as a ring.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array
    skipped: jax.Array
    steps: jax.Array
    values: jax.Array


@dataclass(frozen=True)
class SkipBad(Guard):
    """An update is left out where loss or gradient norm is not finite, or lies too far above the running mean.

    Parameters, moments and average stay as they are, and the schedule waits; the batch is gone. deviations: how many standard
    deviations above the mean are too far; decay: of the exponential averages that mean and deviation are; after: updates before
    anything finite is. A value beyond the limit counts as the limit, so that a lasting change is soon taken for what it is.
    "train/skipped" is the share that was left out, and the other "train/…" are of those that were not. OLMo-core and Levanter leave
    updates out in this way, by deviations of loss and gradient norm over the last 128.
    """

    deviations: float = 6.0
    decay: float = 0.99
    after: int = 100

    def validate(self):
        require_positive(self, "deviations")
        require_fraction(self, "decay")
        require(self.after >= 2, "after", f"must be >= 2, which a deviation takes, got {self.after}")

    def start(self):
        zero = jnp.zeros((), jnp.int32)
        steps, values = jnp.full((RECENT,), -1, jnp.int32), jnp.zeros((RECENT, 2), jnp.float32)
        return Seen(zero, jnp.zeros((2,), jnp.float32), jnp.zeros((2,), jnp.float32), zero, steps, values)

    def guarded(self, old, new, metrics, *, loss, norm):
        seen, values = old.guard, jnp.stack([loss, norm]).astype(jnp.float32)
        limit = jnp.where(seen.count >= self.after, seen.mean + self.deviations * jnp.sqrt(seen.variance), jnp.inf)
        finite = jnp.isfinite(values).all()
        good = finite & (values <= limit).all()
        kept = ("params", "opt_state", "average")
        parts = {name: (getattr(new, name), getattr(old, name)) for name in kept}
        chosen = {name: jax.tree.map(lambda a, b: jnp.where(good, a, b), *pair) for name, pair in parts.items()}
        place = seen.skipped % RECENT
        noted = replace(
            jax.tree.map(lambda a, b: jnp.where(finite, a, b), self._with(seen, jnp.minimum(values, limit)), seen),
            skipped=seen.skipped + ~good,
            steps=seen.steps.at[place].set(jnp.where(good, seen.steps[place], old.step)),
            values=seen.values.at[place].set(jnp.where(good, seen.values[place], values)),
        )
        metrics = {name: jax.tree.map(lambda x: jnp.where(good, x, 0), value) for name, value in metrics.items()}
        return replace(new, **chosen, guard=noted), metrics | {"train/skipped": Weighted.of(~good)}

    def _with(self, seen: Seen, values: jax.Array) -> Seen:
        """Mean and variance with one more of each value: averages with weights decayⁿ that add up to 1, as of Adam's moments."""
        rate = (1 - self.decay) / (1 - self.decay ** (seen.count + 1).astype(jnp.float32))
        change = values - seen.mean
        variance = (1 - rate) * (seen.variance + rate * change**2)
        return replace(seen, count=seen.count + 1, mean=seen.mean + rate * change, variance=variance)

    def watch(self, incidents):
        return _Skipping(incidents)


class _Skipping(Watch):
    """Writes down which updates were left out."""

    def __init__(self, incidents: Incidents):
        self.incidents, self.last = incidents, 0

    def rewind(self, step):
        self.last = step
        self.incidents.drop_from(step)

    def look(self, step, rows, state, losses, saved):
        worse = [member for member, row in enumerate(rows) if row.get("train/skipped")]
        for row in [row for row in rows if row.get("train/skipped") == 1]:  # nothing else was counted
            row.update({name: math.nan for name in row if name.startswith("train/") and name != "train/skipped"})
        if worse and step > self.last:  # else it was stopped before it could be recorded
            steps_SR, values_SR2 = jax.device_get((state.guard.steps, state.guard.values))
            for member in worse:
                self._note(member, rows[member], step, steps_SR[member], values_SR2[member])
        self.last = step

    def _note(self, member: int, row: Row, step: int, steps_R: np.ndarray, values_R2: np.ndarray) -> None:
        count = round(row["train/skipped"] * (step - self.last))
        for place in np.argsort(steps_R):
            if steps_R[place] >= self.last:
                loss, norm = (float(value) for value in values_R2[place])
                self.incidents.write(member, "skipped", int(steps_R[place]), loss=loss, gradient_norm=norm)
        self.incidents.say(member, f"{count} of {step - self.last} updates up to step {step} were left out")
