"""Updates that are left out: against float64, against training without their batches, and in a population each for itself."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch, Weighted
from llm_jax.train.guard import RECENT, NoGuard, SkipBad
from llm_jax.train.incidents import Incidents
from llm_jax.train.rollback import RollBack
from llm_jax.train.step import TrainState, make_train_step, many_steps

GUARD = SkipBad(deviations=4.0, decay=0.9, after=8)


def statistics(values, decay):
    """Mean and variance with weights decayⁿ, n updates ago, that add up to 1."""
    weights = decay ** np.arange(len(values))[::-1].astype(np.float64)
    mean = np.average(values, weights=weights)
    return mean, np.average((values - mean) ** 2, weights=weights)


def state(guard):
    params = {"w": jnp.float32(0.3)}
    optimizer = optax.adam(0.01)
    return TrainState(jnp.int32(0), params, optimizer.init(params), params, jax.random.key(0), guard.start())


def loss(params, batch, rng):
    error = (params["w"] * batch.tokens - batch.targets) ** 2
    return Weighted(error.sum(), jnp.float32(error.size)), {}


def step(guard):
    return make_train_step(loss, optax.with_extra_args_support(optax.adam(0.01)), average=0.9, guarded=guard.guarded)


def batches(count, bad=(), value=np.nan):
    targets = np.random.default_rng(3).normal(size=(count, 4, 2)).astype(np.float32)
    for place in bad:
        targets[place] = value
    return Batch(np.ones_like(targets), targets)


def test_mean_and_deviation_are_the_exponential_ones():
    losses = np.random.default_rng(0).normal(3, 0.2, 40)
    norms = np.random.default_rng(1).lognormal(size=40)
    seen = state(GUARD).guard
    for pair in zip(losses, norms, strict=True):
        seen = GUARD._with(seen, jnp.array(pair, jnp.float32))
    expected = [statistics(values, GUARD.decay) for values in (losses, norms)]
    np.testing.assert_allclose(seen.mean, [mean for mean, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(seen.variance, [variance for _, variance in expected], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e4], ids=["nan", "inf", "spike"])
def test_training_goes_on_as_if_the_batch_had_not_been_there(value):
    bad, count = (11, 17), 24
    run = jax.jit(lambda s, b: jax.lax.scan(step(GUARD), s, b))
    after, metrics = run(state(GUARD), batches(count, bad, value))
    good = batches(count)
    kept = jax.tree.map(lambda x: np.delete(x, bad, 0), good)
    without, expected = run(state(GUARD), kept)
    for part in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(without, part))
    assert int(after.step) == count and int(after.guard.skipped) == 2 and int(without.guard.skipped) == 0
    assert after.guard.steps[:3].tolist() == [*bad, -1]
    skipped = np.asarray(metrics["train/skipped"].total)
    assert np.flatnonzero(skipped).tolist() == list(bad)
    np.testing.assert_array_equal(np.delete(metrics["train/loss"].total, bad), expected["train/loss"].total)
    assert all(metrics[name].weight[11] == 0 for name in ("train/loss", "train/grad_norm"))


def test_what_is_finite_is_judged_only_once_there_is_something_to_judge_it_by():
    after, _ = many_steps(step(GUARD), state(GUARD), batches(6, (3,), 1e4))
    assert int(after.guard.skipped) == 0
    after, _ = many_steps(step(GUARD), state(GUARD), batches(6, (3,), np.nan))
    assert int(after.guard.skipped) == 1


def test_a_lasting_change_is_taken_for_what_it_is():
    _, metrics = jax.lax.scan(step(GUARD), state(GUARD), batches(120, range(60, 120), 100.0))
    skipped = np.asarray(metrics["train/skipped"].total)
    assert skipped[60] == 1 and skipped[60:].sum() < 30 and not skipped[-20:].any()


def test_many_bad_ones_are_counted_and_the_last_ones_known():
    after, _ = many_steps(step(GUARD), state(GUARD), batches(30, range(5, 28), np.nan))
    assert int(after.guard.skipped) == 23 and sorted(after.guard.steps.tolist()) == list(range(28 - RECENT, 28))


def test_without_a_guard_the_step_is_the_one_it_was():
    plain = make_train_step(loss, optax.with_extra_args_support(optax.adam(0.01)), average=0.9)
    one = jax.tree.map(lambda x: x[0], batches(1))
    traced = [str(jax.make_jaxpr(f)(state(NoGuard()), one)) for f in (plain, step(NoGuard()), step(RollBack()))]
    assert traced[0] == traced[1] == traced[2] and state(RollBack()).guard is None
    assert traced[0] != str(jax.make_jaxpr(step(GUARD))(state(GUARD), one))


def test_which_batch_it_was_is_written_down(tmp_path):
    told, folders = [], [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    incidents = Incidents(folders, [7, 8], lambda seed, number: [seed, number], told.append)
    watch = GUARD.watch(incidents)
    after, metrics = jax.vmap(lambda b: many_steps(step(GUARD), state(GUARD), b))(
        jax.tree.map(lambda a, b: np.stack([a, b]), batches(10), batches(10, (2, 6)))
    )
    rows = [{name: float(value.mean[i]) for name, value in metrics.items()} for i in range(2)]
    watch.rewind(0)
    assert watch.look(10, rows, after, [], list) is None
    assert not (folders[0] / "incidents.jsonl").exists()
    lines = [json.loads(line) for line in (folders[1] / "incidents.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seed"], line["loss"], line["batches"][0]["of"]) for line in lines] == [
        (2, 8, None, [8, 2]),
        (6, 8, None, [8, 6]),
    ]
    assert told == [f"seed 8: 2 of 10 updates up to step 10 were left out (see {folders[1] / 'incidents.jsonl'})"]
    watch.rewind(10)
    watch.look(10, rows, after, [], list)
    assert len(told) == 1 and len(incidents.read(1)) == 2, "once, also where it was stopped before it was recorded"
    watch.rewind(5)
    assert [line["step"] for line in incidents.read(1)] == [2], "those after it are found again"


def test_a_line_that_was_cut_short_is_dropped_and_too_many_say_less(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_jax.train.incidents.MOST", 2)
    incidents = Incidents([tmp_path], [0], lambda seed, number: number, lambda text: None)
    for step in range(3):
        incidents.write(0, "skipped", step, loss=math.inf)
    assert [line["batches"][0]["of"] for line in incidents.read(0)] == [0, 1, None]
    file = tmp_path / "incidents.jsonl"
    file.write_text(file.read_text()[:-9])
    incidents.drop_from(math.inf)
    incidents.write(0, "skipped", 7)
    assert [line["step"] for line in incidents.read(0)] == [0, 1, 7]


def test_an_interval_without_a_single_update_has_no_loss(tmp_path):
    watch = GUARD.watch(Incidents([tmp_path], [0], lambda seed, number: None, lambda text: None))
    after, metrics = many_steps(step(GUARD), state(GUARD), batches(3, (0, 1, 2)))
    rows = [{name: float(value.mean) for name, value in metrics.items()}]
    watch.look(3, rows, replace(after, guard=jax.tree.map(lambda x: x[None], after.guard)), [], list)
    assert rows[0]["train/skipped"] == 1 and math.isnan(rows[0]["train/loss"])


@pytest.mark.parametrize("given, path", [({"deviations": 0.0}, "deviations"), ({"decay": 1.0}, "decay"), ({"after": 1}, "after")])
def test_bad_settings_are_refused(given, path):
    with pytest.raises(ConfigError, match=path):
        SkipBad(**given)
