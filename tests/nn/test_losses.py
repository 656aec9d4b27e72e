"""Losses and scores of tokens against their definitions written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from llm_jax.core.config import Config, ConfigError, components
from llm_jax.core.types import Weighted
from llm_jax.nn.losses import (
    Brier,
    Criterion,
    CrossEntropy,
    Focal,
    SquaredError,
    cross_entropy,
    distillation,
    smoothed,
    top_k_distillation,
)
from llm_jax.nn.scores import BINS, calibration_error, calibration_sums, confidence, rank

N, V = 6, 9
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (N, V))
TEACHER = RNG.normal(0, 2, (N, V))
TARGETS = RNG.integers(0, V, N)
LOG_P, LOG_Q = log_softmax(LOGITS, -1), log_softmax(TEACHER, -1)
HOT = np.eye(V)[TARGETS]
NLL = -(HOT * LOG_P).sum(-1)

DEFINITIONS = {
    CrossEntropy(): NLL,
    Focal(gamma=2.0): (1 - np.exp(-NLL)) ** 2 * NLL,
    Focal(gamma=0.5): (1 - np.exp(-NLL)) ** 0.5 * NLL,
    Focal(gamma=0.0): NLL,
    Brier(): ((np.exp(LOG_P) - HOT) ** 2).sum(-1),
    SquaredError(height=3.0, weight=2.0): np.where(HOT, 2 * (LOGITS - 3) ** 2, LOGITS**2).mean(-1),
}


@pytest.mark.parametrize("criterion", DEFINITIONS, ids=str)
def test_criteria_are_their_definitions(criterion: Criterion):
    np.testing.assert_allclose(jax.jit(criterion)(jnp.float32(LOGITS), TARGETS), DEFINITIONS[criterion], rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        differentiate = jax.jit(jax.value_and_grad(lambda z: criterion(z, TARGETS).sum()))
        slopes = np.asarray(differentiate(LOGITS)[1])
        way = RNG.normal(size=LOGITS.shape)
        ahead, behind = (float(differentiate(LOGITS + step * way)[0]) for step in (1e-5, -1e-5))
    np.testing.assert_allclose((slopes * way).sum(), (ahead - behind) / 2e-5, rtol=1e-6)


def test_every_criterion_is_in_the_table():
    known = {name for name, kind in components(Criterion).items() if kind.__module__.startswith("llm_jax.")}
    assert known == {type(criterion).__name__ for criterion in DEFINITIONS}


def test_criteria_of_certain_predictions_have_finite_gradients():
    """Where the target has all the probability, float32 leaves nothing of 1 - p."""
    certain = np.float32(200 * np.eye(V)[[0, 0]])

    def total(logits):
        return sum(criterion(logits, np.array([0, 1])).sum() for criterion in DEFINITIONS)

    assert np.isfinite(jax.jit(jax.grad(total))(certain)).all()


@pytest.mark.parametrize("wrong", [lambda: Focal(gamma=-1.0), lambda: SquaredError(weight=0.0)])
def test_impossible_criteria_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be >"):
        wrong()
    assert issubclass(Criterion, Config)


def test_smoothing_is_the_cross_entropy_to_a_softened_target():
    softened = 0.3 / V + 0.7 * HOT
    got = smoothed(*cross_entropy(jnp.float32(LOGITS), TARGETS), jnp.float32(LOGITS), 0.3)
    np.testing.assert_allclose(got, -(softened * LOG_P).sum(-1), rtol=1e-5)


# ── distillation ─────────────────────────────────────────────────────────────────────────────────────────────────────
def kl(log_q, log_p):
    return (np.exp(log_q) * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_from_the_teacher(temperature):
    got = jax.jit(distillation, static_argnames="temperature")(np.float32(LOGITS), np.float32(TEACHER), temperature=temperature)
    softened = log_softmax(TEACHER / temperature, -1), log_softmax(LOGITS / temperature, -1)
    np.testing.assert_allclose(got, temperature**2 * kl(*softened), rtol=1e-5)
    both = jax.jit(jax.grad(lambda z, teacher: distillation(z, teacher, temperature=temperature).sum(), (0, 1)))
    slope, taught = both(np.float32(LOGITS), np.float32(TEACHER))
    np.testing.assert_allclose(slope, temperature * (np.exp(softened[1]) - np.exp(softened[0])), atol=1e-5)  # Hinton et al., eq. 2
    np.testing.assert_array_equal(taught, 0)


def top(count):
    ids = np.argsort(-TEACHER, -1)[:, :count]
    return ids, np.take_along_axis(LOG_Q, ids, -1)


@pytest.mark.parametrize("count", [1, 3, V - 1])
def test_top_k_distillation_tells_the_others_not_apart(count):
    ids, log_q = top(count)
    merged = []
    for log in (LOG_Q, LOG_P):
        rest = np.array([logsumexp(np.delete(row, i)) for row, i in zip(log, ids, strict=True)])
        merged.append(np.concatenate([np.take_along_axis(log, ids, -1), rest[:, None]], -1))
    got = jax.jit(top_k_distillation)(np.float32(LOGITS), ids, np.float32(log_q))
    np.testing.assert_allclose(got, kl(*merged), rtol=1e-4)
    full = kl(LOG_Q, LOG_P)
    assert (got <= full + 1e-5).all()
    if count == V - 1:
        np.testing.assert_allclose(got, full, rtol=1e-4)


def test_top_k_distillation_needs_others_and_its_gradient_is_bounded():
    with pytest.raises(ValueError, match="leaves no others"):
        top_k_distillation(jnp.float32(LOGITS), *top(V))
    sure = np.float32(60 * np.eye(V)[[0]])  # the others together have 1e-25
    half = np.float32([[np.log(0.5)]])
    slope = jax.jit(jax.grad(lambda z: top_k_distillation(z, np.array([[0]]), half).sum()))(sure)
    np.testing.assert_allclose(slope, [[0.5] + [-0.5 / (V - 1)] * (V - 1)], rtol=1e-5)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_rank_is_the_place_in_top_k():
    tied = np.round(LOGITS) + 0.0  # several equal logits a row, and no -0, which top_k puts below 0
    order = np.asarray(jax.lax.top_k(tied, V)[1])
    np.testing.assert_array_equal(rank(jnp.asarray(tied), TARGETS), (order == TARGETS[:, None]).argmax(-1))
    np.testing.assert_array_equal(rank(jnp.full((N, V), jnp.nan), TARGETS), V)


def test_calibration_error_adds_up_over_batches():
    logits = np.float32(RNG.normal(0, 3, (400, V)))
    targets, weights = RNG.integers(0, V, 400), np.float32(RNG.integers(0, 3, 400))
    sure = np.exp(log_softmax(np.float64(logits), -1).max(-1))
    np.testing.assert_allclose(jax.jit(confidence)(logits), sure, rtol=1e-5)
    hits, expected = logits.argmax(-1) == targets, 0.0
    for low in np.arange(BINS) / BINS:
        inside = (sure >= low) & (sure < low + 1 / BINS) if low < 1 - 1.5 / BINS else sure >= low
        if weights[inside].sum():
            gap = np.average(hits[inside], weights=weights[inside]) - np.average(sure[inside], weights=weights[inside])
            expected += weights[inside].sum() / weights.sum() * abs(gap)
    sums = jax.jit(lambda *given: calibration_sums(confidence(given[0]), *given[1:]))
    halves = [sums(logits[s], np.float32(hits[s]), weights[s]) for s in (slice(0, 200), slice(200, None))]
    sums = Weighted(halves[0].total + halves[1].total, halves[0].weight + halves[1].weight)
    np.testing.assert_allclose(calibration_error(sums).mean, expected, rtol=1e-4)
    np.testing.assert_allclose(calibration_error(sums).weight, weights.sum())


def test_certainty_belongs_to_the_last_interval():
    sums = calibration_sums(jnp.ones(3), jnp.array([1.0, 1.0, 0.0]), jnp.ones(3))
    np.testing.assert_allclose(calibration_error(sums).mean, 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(sums.weight, [0] * (BINS - 1) + [3])
