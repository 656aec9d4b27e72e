"""The only loop over training steps: dispatch, record, evaluate, checkpoint, and stop cleanly when asked to."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llm_jax.core.types import Batch, Metrics, Probed
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.train.interruption import Stop, interruptions

# dispatches under way at once: enough to keep a device fed; with many, XLA's CPU devices can wait for each other without end
RUN_AHEAD = 4

Row = dict[str, float]


@dataclass(frozen=True)
class Program:
    """Compiled functions over `members` trials at once; every state leaf and metric has a leading `[members]` axis.

    init: `() -> state`. steps: `(state, host batches [members, k, B, L]) -> (state, metrics summed over k)`.
    evaluate: `(state, batches [n, B, L] or what a probe needs) -> metrics summed over n`. abstract: the state's shapes, dtypes and
    shardings.
    """

    members: int
    init: Callable[[], Any]
    steps: Callable[[Any, Batch], tuple[Any, Metrics]]
    evaluate: Callable[[Any, Batch | Probed], Metrics]
    abstract: Any


@dataclass(frozen=True)
class Rhythm:
    """When things happen, in steps; `dispatch` steps run in one call of the program and must divide every other."""

    steps: int
    dispatch: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def fitting(cls, *, steps: int, log_every: int, evaluate_every: int, checkpoint_every: int, dispatch: int) -> Rhythm:
        """The rhythm with the longest dispatch, at most `dispatch`, that divides every interval: one program, one shape."""
        common = math.gcd(steps, log_every, evaluate_every, checkpoint_every)
        longest = max(d for d in range(1, min(dispatch, common) + 1) if common % d == 0)
        return cls(steps, longest, log_every, evaluate_every, checkpoint_every)

    def at(self, step: int, every: int) -> bool:
        """Whether something that happens every so often, and at the end, happens after `step` steps."""
        return step % every == 0 or step == self.steps


@dataclass
class Session:
    """What surrounds the steps: where records go, what is evaluated, and who is told.

    record: `(step, rows)`, one row of numbers a member. evaluations: name → batches `[n, B, L]` scored during training;
    final: those scored at the end instead.
    rewind: called with the restored step, and that of the last record that stays, before anything is recorded.
    flops_per_step, tokens_per_step: of one member.
    """

    record: Callable[[int, list[Row]], None]
    rewind: Callable[[int, int], None]
    report: Callable[..., None]
    evaluations: Mapping[str, Batch]
    final: Mapping[str, Batch | Probed]
    tokens_per_step: float
    flops_per_step: float
    checkpointer: Checkpointer | None = None


def fit(program: Program, feed: Callable[[int], Iterator[Batch]], rhythm: Rhythm, session: Session) -> list[Row]:
    """Trains to `rhythm.steps` and returns the final scores, a row a member; resumes from the newest good checkpoint, if any.

    feed: `start_step -> iterator of host batches [members, dispatch, B, L]`. Raises `Interrupted` after saving.
    """
    with interruptions(together=jax.process_count() > 1) as stop:
        return _Training(program, feed, rhythm, session, stop).finish()


class _Training:
    """What `fit` does, from one dispatch to the next."""

    def __init__(self, program: Program, feed: Callable[[int], Iterator[Batch]], rhythm: Rhythm, session: Session, stop: Stop):
        self.program, self.rhythm, self.session, self.stop = program, rhythm, session, stop
        self.state, self.step, elapsed, self.sums = _start(program, session)
        self.due = bool(self.sums) and rhythm.at(self.step, rhythm.log_every)  # it was stopped while it was scored
        session.rewind(self.step, self.step - self.due)
        self.clock = _Clock(elapsed)  # goes from the first dispatch on: what was compiled for it is not training
        self.batches = feed(self.step)
        self.pending: list[Metrics] = []
        self.scored: list[Row] | None = None

    def finish(self) -> list[Row]:
        if self.due:
            self._record()
        while self.step < self.rhythm.steps:
            self._dispatch()
            row = self._record() if self.rhythm.at(self.step, self.rhythm.log_every) else {}
            stopping, saved = self.stop.asked(), False
            if stopping or self.rhythm.at(self.step, self.rhythm.checkpoint_every):
                self.sums = _settle(self.sums, self.pending)
                saved = _save(self.state, self.step, self.clock, self.sums, row, self.session)
            if stopping:
                checkpointer = self.session.checkpointer
                raise self.stop.interrupted(self.step, saved and checkpointer is not None and checkpointer.wait())
        # None: restored at the end
        return scores(self.program, self.state, self.session.final) if self.scored is None else self.scored

    def _dispatch(self) -> None:
        self.state, metrics = self.program.steps(self.state, next(self.batches))
        self.stop.at_stake = True
        if not self.clock.running:
            self.clock.go()
        self.pending.append(metrics)
        if len(self.pending) >= RUN_AHEAD:
            jax.block_until_ready(self.pending[-RUN_AHEAD])
        self.step += self.rhythm.dispatch

    def _record(self) -> Row:
        """Publishes what is new since the last record; nothing, for now, if it is asked to stop before all is scored."""
        self.sums = _settle(self.sums, self.pending)
        rows = _rows(self.sums, self.program.members)
        if self.rhythm.at(self.step, self.rhythm.evaluate_every):
            sets = self.session.final if self.step == self.rhythm.steps else self.session.evaluations
            with self.clock.paused():
                scored = scores(self.program, self.state, sets, unless=self.stop.asked)
            if len(scored) < len(rows):
                return {}
            self.scored, rows = scored, [a | b for a, b in zip(rows, scored, strict=True)]
        self.sums = {}
        return _publish(self.step, rows, self.clock, self.session, self.program.members)


def scores(
    program: Program, state: Any, evaluations: Mapping[str, Batch | Probed], *, unless: Callable[[], bool] = lambda: False
) -> list[Row]:
    """The mean of every metric of every evaluation set, one row a member; "valid" gives "valid/loss", ….

    A name such as "valid@4x" puts its suffix last: "valid/loss@4x". Batches with two names are scored once. unless: asked before
    each set; no row at all where it was true.
    """
    rows: list[Row] = [{} for _ in range(program.members)]
    known: dict[int, list[Row]] = {}
    for name, batches in evaluations.items():
        split, at, length = name.partition("@")
        if unless():
            return []
        if id(batches) not in known:
            known[id(batches)] = _rows(_settle({}, [program.evaluate(state, batches)]), program.members)
        for row, values in zip(rows, known[id(batches)], strict=True):
            row.update({f"{split}/{metric}{at}{length}": value for metric, value in values.items()})
    return rows


@dataclass
class _Clock:
    """Seconds spent training, over interruptions, without compilation and evaluations."""

    elapsed: float
    since: float = 0.0
    running: bool = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running, self.elapsed, self.running = self.running, self.read(), False
        yield
        if running:
            self.go()

    def go(self) -> None:
        self.since, self.running = time.perf_counter(), True

    def read(self) -> float:
        return self.elapsed + (time.perf_counter() - self.since if self.running else 0.0)


Sums = dict[str, tuple[np.ndarray, np.ndarray]]


def _settle(sums: Sums, pending: list[Metrics]) -> Sums:
    """`sums` plus all pending metrics, fetched from the device and added in float64 in the order of the steps."""
    sums = dict(sums)
    for metrics in jax.device_get(pending):
        for name, value in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + np.asarray(value.total, np.float64), old[1] + np.asarray(value.weight, np.float64))
    pending.clear()
    return sums


def _rows(sums: Sums, members: int) -> list[Row]:
    means = {name: total / np.maximum(weight, 1e-30) for name, (total, weight) in sums.items()}
    return [{name: float(values[i]) for name, values in means.items()} for i in range(members)]


def _publish(step: int, rows: list[Row], clock: _Clock, session: Session, members: int) -> Row:
    """Records the rows with their axes, shows the mean of those that have not diverged, and returns it."""
    seconds = clock.read() / members  # a trial's share of the program's time
    axes = {"step": step, "tokens": step * session.tokens_per_step, "flops": step * session.flops_per_step, "seconds": seconds}
    session.record(step, [axes | row for row in rows])
    finite = {name: [row[name] for row in rows if math.isfinite(row[name])] for name in rows[0]}
    mean = {name: float(np.mean(values)) if values else math.nan for name, values in finite.items()}
    session.report(step, **mean)
    return mean


def _start(program: Program, session: Session) -> tuple[Any, int, float, Sums]:
    restored = session.checkpointer.restore(program.abstract) if session.checkpointer is not None else None
    if restored is None:
        return program.init(), 0, 0.0, {}
    step, state, extra = restored
    sums = {name: (np.asarray(t, np.float64), np.asarray(w, np.float64)) for name, (t, w) in extra["sums"].items()}
    return state, step, extra["seconds"], sums


def _save(state: Any, step: int, clock: _Clock, sums: Sums, row: Row, session: Session) -> bool:
    if session.checkpointer is None:
        return False
    extra = {
        "seconds": clock.read(),
        "sums": {name: [np.atleast_1d(t).tolist(), np.atleast_1d(w).tolist()] for name, (t, w) in sums.items()},
    }
    return session.checkpointer.save(step, state, extra, row)
