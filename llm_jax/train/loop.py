"""The only loop over training steps: dispatch, record, evaluate, checkpoint, and stop cleanly when asked to."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llm_jax.core import distributed
from llm_jax.core.types import Batch, Metrics, Probed
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.io.nearby import Nearby
from llm_jax.io.profile import Profiler
from llm_jax.train.guard import Watch
from llm_jax.train.interruption import Stop, interruptions
from llm_jax.train.watchdog import Watchdog

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

    def due(self, step: int, sums: Mapping[str, Any]) -> bool:
        """Whether a record is, of a state that was saved with sums: it was stopped while it was scored."""
        return bool(sums) and self.at(step, self.log_every)

    def told(self, step: int, sums: Mapping[str, Any]) -> int:
        """The step of the last record before such a state was saved."""
        last = step - self.due(step, sums)
        return last if self.at(last, self.log_every) else last - last % self.log_every


@dataclass
class Session:
    """What surrounds the steps: where records go, what is evaluated, and who is told.

    record: `(step, rows)`, one row of numbers a member. evaluations: name → batches `[n, B, L]` scored during training;
    final: those scored at the end instead.
    rewind: called with the restored step, and that of the last record that stays, before anything is recorded. watch: a guard's;
    nearby: copies on this machine's own disk. recorded: the step up to which there are records; a copy that came after more,
    and was left when training went on elsewhere, is passed over.
    keep: called before a state is saved or copied; records must outlive the process too.
    proceed: called after every dispatch, before anything of it is written; what it raises ends training, and nothing is saved.
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
    nearby: Nearby | None = None
    recorded: Callable[[], float] = lambda: math.inf
    proceed: Callable[[], None] = lambda: None
    keep: Callable[[], None] = lambda: None
    watch: Watch = field(default_factory=Watch)
    watchdog: Watchdog = field(default_factory=Watchdog)
    profiler: Profiler = field(default_factory=Profiler)


def fit(program: Program, feed: Callable[[int], Iterator[Batch]], rhythm: Rhythm, session: Session) -> list[Row]:
    """Trains to `rhythm.steps` and returns the final scores, a row a member; resumes from the newest good checkpoint, if any.

    feed: `start_step -> iterator of host batches [members, dispatch, B, L]`. Raises `Interrupted` after saving.
    """
    with (
        interruptions(together=jax.process_count() > 1) as stop,
        session.watchdog.watching(),
        contextlib.closing(session.profiler),
    ):
        return _Training(program, feed, rhythm, session, stop).finish()


class _Training:
    """What `fit` does, from one dispatch to the next."""

    def __init__(self, program: Program, feed: Callable[[int], Iterator[Batch]], rhythm: Rhythm, session: Session, stop: Stop):
        self.program, self.rhythm, self.session, self.stop = program, rhythm, session, stop
        self.feed, self.pending, self.losses, self.scored = feed, list[Metrics](), list[np.ndarray](), None
        self.clock = _Clock()  # goes from the first dispatch on: what was compiled for it is not training
        self.clock.elapsed = self._begin()

    def _begin(self, at_most: int | None = None) -> float:
        """From the newest checkpoint, at `at_most` or before, where there is one; the seconds that it had taken."""
        self.state = None  # so that there is room for the other
        self.state, self.step, seconds, self.sums = _start(self.program, self.rhythm, self.session, at_most)
        self.due = self.rhythm.due(self.step, self.sums)
        self.session.rewind(self.step, self.step - self.due)
        self.session.watch.rewind(self.step)
        self.batches = self.session.watch.feed(self.feed, self.step, self.rhythm.dispatch)
        self.losses, self.apart = [], True
        return seconds

    def finish(self) -> list[Row]:
        while self.step < self.rhythm.steps or self.due:
            restored = self.due
            if not restored:
                self._dispatch()
            row = self._record() if self.rhythm.at(self.step, self.rhythm.log_every) else {}
            if row is None:
                continue
            stopping = self.stop.asked()
            saved = restored
            if not restored and (stopping or self.rhythm.at(self.step, self.rhythm.checkpoint_every)):
                saved = self._save(row)
            if not saved and self._is_due_nearby():
                self.session.nearby.save(self.step, self.state, self._rest())
            if stopping:
                checkpointer = self.session.checkpointer
                raise self.stop.interrupted(self.step, saved and checkpointer is not None and checkpointer.wait())
        if self.session.checkpointer is not None:
            with self.session.watchdog.resting():
                saved = self.session.checkpointer.wait()  # while a signal still is a question
            if self.stop.asked():
                raise self.stop.interrupted(self.step, saved)
        # None: restored at the end
        return scores(self.program, self.state, self.session.final) if self.scored is None else self.scored

    def _dispatch(self) -> None:
        after = self.step + self.rhythm.dispatch
        self.session.profiler.before(self.step, after, self.pending)
        batches = next(self.batches)
        if self.apart:  # all have read and written at their own speed
            with self.session.watchdog.resting():
                distributed.abreast("training goes on")
            self.apart = False
        self.state, metrics = self.program.steps(self.state, batches)
        self.stop.at_stake = True
        if not self.clock.running:
            self.clock.go()
        self.pending.append(metrics)
        self.step = after
        self.session.proceed()
        self.session.watchdog.alive(after)  # what was compiled for the first is over
        if len(self.pending) >= RUN_AHEAD:
            jax.block_until_ready(self.pending[-RUN_AHEAD])
        self.session.profiler.after(after, self.pending)

    def _settle(self) -> None:
        """Fetches all pending metrics from the device and adds them to the sums, in float64 in the order of the steps."""
        for metrics in jax.device_get(self.pending):
            for name, value in metrics.items():
                old = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (old[0] + np.asarray(value.total, np.float64), old[1] + np.asarray(value.weight, np.float64))
            if "train/loss" in metrics:
                self.losses.append(metrics["train/loss"].mean)
        self.pending.clear()

    def _record(self) -> Row | None:
        """Publishes what is new since the last record, or nothing, for now, if it is asked to stop before all is scored.

        None: it was so bad that training has gone back.
        """
        self.due = False
        self._settle()
        rows = _rows(self.sums, self.program.members)
        back = self.session.watch.look(self.step, rows, self.state, self.losses, self._saved)
        if back is not None:
            with self.session.watchdog.resting():
                self._begin(back)
            return None
        if self.rhythm.at(self.step, self.rhythm.evaluate_every):
            sets = self.session.final if self.step == self.rhythm.steps else self.session.evaluations
            with self.clock.paused(), self.session.watchdog.resting():
                scored = scores(self.program, self.state, sets, unless=self.stop.asked)
            if len(scored) < len(rows):
                return {}
            self.scored, rows = scored, [a | b for a, b in zip(rows, scored, strict=True)]
        self.sums, self.losses = {}, []
        return _publish(self.step, rows, self.clock, self.session, self.program.members)

    def _saved(self) -> list[int]:
        return [] if self.session.checkpointer is None else self.session.checkpointer.steps()

    def _save(self, row: Row) -> bool:
        if self.session.checkpointer is None:
            return False
        return self.session.checkpointer.save(self.step, self.state, self._rest(), row)

    def _rest(self) -> dict[str, Any]:
        """What is saved with the state."""
        self._settle()
        self.session.keep()
        self.apart = True
        sums = {name: [np.atleast_1d(t).tolist(), np.atleast_1d(w).tolist()] for name, (t, w) in self.sums.items()}
        return {"seconds": self.clock.read(), "sums": sums}

    def _is_due_nearby(self) -> bool:
        return self.session.nearby is not None and self.step % self.session.nearby.every < self.rhythm.dispatch


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
            found = jax.device_get(program.evaluate(state, batches))
            known[id(batches)] = _rows({name: (value.total, value.weight) for name, value in found.items()}, program.members)
        for row, values in zip(rows, known[id(batches)], strict=True):
            row.update({f"{split}/{metric}{at}{length}": value for metric, value in values.items()})
    return rows


@dataclass
class _Clock:
    """Seconds spent training, over interruptions, without compilation and evaluations."""

    elapsed: float = 0.0
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


def _rows(sums: Sums, members: int) -> list[Row]:
    means = {name: np.asarray(total, np.float64) / np.maximum(weight, 1e-30) for name, (total, weight) in sums.items()}
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


def _start(program: Program, rhythm: Rhythm, session: Session, at_most: int | None) -> tuple[Any, int, float, Sums]:
    checkpointer, nearby, restored = session.checkpointer, session.nearby, None
    if nearby is not None and at_most is not None:
        nearby.clear()  # it may be of what training goes back from
    if nearby is not None:
        after, recorded = max(checkpointer.steps() if checkpointer is not None else [], default=0), session.recorded()
        fits = lambda step, extra: rhythm.told(step, extra["sums"]) <= recorded  # noqa: E731
        restored = nearby.restore(program.abstract, after=after, fits=fits)
    if restored is None and checkpointer is not None:
        restored = checkpointer.restore(program.abstract, at_most=at_most)
    if restored is None:
        return program.init(), 0, 0.0, {}
    step, state, extra = restored
    sums = {name: (np.asarray(t, np.float64), np.asarray(w, np.float64)) for name, (t, w) in extra["sums"].items()}
    return state, step, extra["seconds"], sums
