"""The step against numpy: accumulation adds up token by token, the average is the exponential one, extras arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.types import Batch, Weighted
from llm_jax.train.step import TrainState, make_train_step, many_steps


def loss(params, batch, rng):
    """A linear model on token values, with uneven weights."""
    error = (params["w"] * batch.tokens - batch.targets) ** 2
    total, weight = (error * batch.weights).sum(), batch.weights.sum()
    return Weighted(total, weight), {"error": Weighted(jnp.abs(error).sum(), weight)}


def batch(rows=8, length=4):
    rng = np.random.default_rng(0)
    tokens, targets = rng.normal(size=(2, rows, length)).astype(np.float32)
    weights = (rng.random((rows, length)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32)
    return Batch(tokens, targets, weights)


def state(optimizer, average=None):
    params = {"w": jnp.float32(0.3)}
    return TrainState(jnp.int32(0), params, optimizer.init(params), params if average else None, jax.random.key(0))


@pytest.fixture
def sgd():
    return optax.with_extra_args_support(optax.sgd(0.1))


def gradient(b, w):
    return (2 * (w * b.tokens - b.targets) * b.tokens * b.weights).sum(dtype=np.float64) / b.weights.sum(dtype=np.float64)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_the_update_is_that_of_the_token_weighted_mean(sgd, accumulate):
    b = batch()
    after, metrics = jax.jit(make_train_step(loss, sgd, accumulate=accumulate))(state(sgd), b)
    np.testing.assert_allclose(after.params["w"], 0.3 - 0.1 * gradient(b, 0.3), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/grad_norm"].mean, abs(gradient(b, 0.3)), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"].weight, b.weights.sum())
    assert after.step == 1


def test_the_average_is_exponential(sgd):
    step = jax.jit(make_train_step(loss, sgd, average=0.9))
    s, expected = state(sgd, average=True), 0.3
    for _ in range(3):
        s, _ = step(s, batch())
        expected = 0.9 * expected + 0.1 * float(s.params["w"])
    np.testing.assert_allclose(s.average["w"], expected, rtol=1e-6)


def test_what_is_averaged_is_what_evaluation_would_see(sgd):
    step = jax.jit(make_train_step(loss, sgd, average=0.9, averaged=lambda opt_state, params: {"w": 2 * params["w"]}))
    s, _ = step(state(sgd, average=True), batch())
    np.testing.assert_allclose(s.average["w"], 0.9 * 0.3 + 0.1 * 2 * float(s.params["w"]), rtol=1e-6)


def test_many_steps_are_single_steps_in_a_row(sgd):
    step = make_train_step(loss, sgd)
    rows = batch(rows=12)
    stacked = jax.tree.map(lambda x: x.reshape(3, 4, -1), rows)
    together, summed = jax.jit(lambda s, b: many_steps(step, s, b))(state(sgd), stacked)
    alone, totals = state(sgd), 0.0
    for i in range(3):
        alone, metrics = step(alone, jax.tree.map(lambda x: x[i], stacked))
        totals += float(metrics["train/loss"].total)
    np.testing.assert_allclose(together.params["w"], alone.params["w"], rtol=1e-6)
    np.testing.assert_allclose(summed["train/loss"].total, totals, rtol=1e-6)


def test_the_optimizer_receives_the_loss_and_a_key_of_its_own():
    seen = {}

    def update(grads, opt_state, params=None, *, value, loss_fn, key, **_):
        seen.update(value=value, again=loss_fn(params), key=jax.random.key_data(key))
        return jax.tree.map(jnp.zeros_like, grads), opt_state

    probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
    make_train_step(loss, probe)(state(probe), batch())
    np.testing.assert_allclose(seen["value"], seen["again"], rtol=1e-6)
    assert not np.array_equal(seen["key"], jax.random.key_data(jax.random.fold_in(jax.random.key(0), 0)))
