"""Going back and past what training went wrong on: the same as training that never saw it, also when it is killed in between."""

import itertools
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch, Weighted
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.io.tracker import Tracker
from llm_jax.train.incidents import Incidents, read
from llm_jax.train.interruption import Interrupted
from llm_jax.train.loop import Program, Rhythm, Session, fit
from llm_jax.train.rollback import Diverged, RollBack, merged, number, past

RHYTHM = Rhythm(steps=80, dispatch=2, log_every=4, evaluate_every=80, checkpoint_every=8)
GUARD = RollBack(window=8, before=4, after=4, times=2)


def program(seen, bad, value=np.nan, stop_at=None) -> Program:
    """The state adds up the numbers of its batches, each times the step that it was of; the loss of batches in `bad` is `value`."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stops = [stop_at]

    def steps(state, batches):
        first, numbers = int(state["step"]), batches.tokens[0, :, 0, 0]
        if stops[0] is not None and first >= stops[0]:
            stops[0] = None
            signal.raise_signal(signal.SIGTERM)
        spoilt = sum(value if int(n) in bad else 1.0 + 0.01 * (int(n) % 3) for n in numbers)
        seen.extend((first + i, int(n)) for i, n in enumerate(numbers))
        summed = state["sum"] + sum((first + i) * int(n) for i, n in enumerate(numbers))
        if not math.isfinite(spoilt):
            summed = summed * jnp.nan
        return {"step": state["step"] + len(numbers), "sum": summed}, {"train/loss": Weighted(np.array([spoilt]), np.array([2.0]))}

    abstract = {name: jax.ShapeDtypeStruct((), kind, sharding=where) for name, kind in (("step", jnp.int32), ("sum", jnp.float32))}
    scored = lambda state, batches: {"loss": Weighted(state["sum"][None], np.ones(1))}  # noqa: E731
    return Program(1, lambda: {"step": jnp.int32(0), "sum": jnp.float32(0)}, steps, scored, abstract)


def feed(start):
    for at in itertools.count(start, RHYTHM.dispatch):
        ids = np.arange(at, at + RHYTHM.dispatch).reshape(1, -1, 1, 1)
        yield Batch(ids, ids)


def train(folder, made, guard=GUARD, told=None):
    """The final row; what was recorded lies in the folder."""
    tracker, checkpointer = Tracker(folder, tensorboard=False), Checkpointer(folder / "checkpoints")
    incidents = Incidents([folder], [3], lambda seed, number: f"{seed}:{number}", [].append if told is None else told.append)
    session = Session(
        record=lambda step, rows: tracker.log(rows[0]),
        rewind=lambda step, recorded: tracker.truncate_after(recorded),
        report=lambda step, **numbers: None,
        evaluations={},
        final={"valid": next(feed(0))},
        tokens_per_step=1,
        flops_per_step=1,
        checkpointer=checkpointer,
        watch=guard.watch(incidents),
    )
    try:
        return fit(made, feed, RHYTHM, session)[0]["valid/loss"]
    finally:
        checkpointer.close()
        tracker.close()


def losses(folder):
    return [(row["step"], row["train/loss"]) for row in Tracker.read(folder)]


@pytest.mark.parametrize("value", [np.nan, 50.0], ids=["nan", "spike"])
def test_the_batches_are_left_out_and_the_others_trained_on_in_order(tmp_path, value):
    seen, told = [], []
    final = train(tmp_path, program(seen, {41}, value), told=told)
    (line,) = read(tmp_path)
    # the record of step 44 is bad: all from 4 steps before the last good one, of step 40, until 4 behind it
    assert (line["found_at"], line["step"], line["back_to"], line["left_out"]) == (44, 40, 32, [36, 48])
    assert line["batches"] == [{"number": 40, "of": "3:40"}, {"number": 41, "of": "3:41"}] and len(told) == 1
    expected = [(step, step if step < 36 else step + 12) for step in range(80)]
    assert seen[:44] == [(step, step) for step in range(44)] and seen[44:] == expected[32:]
    assert final == pytest.approx(sum(step * n for step, n in expected), rel=1e-6)
    assert [step for step, _ in losses(tmp_path)] == list(range(4, 84, 4)) and all(loss < 2 for _, loss in losses(tmp_path))


@pytest.mark.parametrize("stop_at", [10, 42, 50])
def test_stopped_at_any_time_it_leaves_out_the_same(tmp_path, stop_at):
    bad = {21, 60, 61}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, program([], bad))
    with pytest.raises(Interrupted):
        train(parts, program([], bad, stop_at=stop_at))
    assert train(parts, program([], bad)) == expected and losses(parts) == losses(whole)
    assert [line["left_out"] for line in read(parts)] == [line["left_out"] for line in read(whole)] and len(read(whole)) == 2


def test_killed_between_going_back_and_writing_it_down_it_does_so_again(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole, program([], {41}))

    def killed(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Incidents, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            train(parts, program([], {41}))
    assert not read(parts)
    assert train(parts, program([], {41})) == expected and losses(parts) == losses(whole)


def test_more_often_than_it_may_it_fails_with_a_sentence(tmp_path):
    with pytest.raises(Diverged, match=r"after training went back 2 times.*train\.guard\.times"):
        train(tmp_path, program([], range(30, 10_000)))
    assert len(read(tmp_path)) == 2
    with pytest.raises(Diverged):
        train(tmp_path, program([], range(30, 10_000)))
    assert len(read(tmp_path)) == 2, "and so it does again, without a further try"


def test_before_the_first_checkpoint_it_begins_again(tmp_path):
    seen = []
    train(tmp_path, program(seen, {5}))
    assert read(tmp_path)[0]["back_to"] == 0 and read(tmp_path)[0]["left_out"] == [0, 12] and seen[8] == (0, 12)


def test_what_is_a_spike():
    guard, known = RollBack(deviations=5, window=8), [3.0, 3.1, 2.9, 3.05, 2.95, 3.0, 3.1, 2.9]
    limit = 3.0 + 5 * 1.4826 * 0.075
    assert guard.is_bad(limit + 0.01, known) and not guard.is_bad(limit - 0.01, known)
    assert guard.is_bad(math.nan, []) and not guard.is_bad(1e9, known[:3])
    assert not guard.is_bad(3.14, [3.0] * 8) and guard.is_bad(3.16, [3.0] * 8), "what does not vary is taken to vary by a hundredth"


def test_numbers_of_batches_are_those_that_are_not_in_a_gap():
    gaps = merged([(20, 24), (4, 8), (8, 10), (22, 30)])
    assert gaps == [(4, 10), (20, 30)]
    left = [n for n in range(200) if not any(a <= n < b for a, b in gaps)]
    assert [number(step, gaps) for step in range(60)] == left[:60]
    for step in range(0, 40, 2):
        got = [int(n) for batch in itertools.islice(past(gaps, feed, step, 2), 10) for n in batch.tokens.flat]
        assert got == left[step : step + 20]


@pytest.mark.parametrize("given", [{"window": 2}, {"times": 0}, {"before": -1}, {"deviations": 0.0}])
def test_bad_settings_are_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        RollBack(**given)
