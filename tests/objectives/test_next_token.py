"""The scores against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from llm_jax.core.types import Batch, Predictions
from llm_jax.models.decoder import Decoder
from llm_jax.objectives.next_token import NextToken

B, L, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (B, L, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, L)).astype(np.int32)
BYTES = np.array([1, 1, 2, 3, 0, 4, 1], np.int32)  # id 4 stands for no text, as the end of a document


def scores(weights, *, train, z_loss=0.0):
    batch = Batch(TARGETS, TARGETS, weights)
    given = {"model": Decoder(), "rng": jax.random.key(0), "byte_lengths": jnp.asarray(BYTES), "train": train}
    return NextToken(z_loss=z_loss).loss(lambda params, batch, rng: Predictions(jnp.asarray(LOGITS)), None, batch, **given)


@pytest.mark.parametrize("weights", [None, (RNG.random((B, L)) < 0.6).astype(np.float32)], ids=["whole", "weighted"])
def test_scores_are_their_definitions(weights):
    loss, metrics = scores(weights, train=False)
    assert set(metrics) == set(NextToken.scores)
    counted = np.ones((B, L)) if weights is None else weights.astype(np.float64)
    nll = -np.take_along_axis(log_softmax(LOGITS.astype(np.float64), -1), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.mean, (nll * counted).sum() / counted.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].mean, loss.mean)
    bits = (nll * counted).sum() / np.log(2) / (BYTES[TARGETS] * counted).sum()
    np.testing.assert_allclose(metrics["bits_per_byte"].mean, bits, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["accuracy"].mean, ((LOGITS.argmax(-1) == TARGETS) * counted).sum() / counted.sum(), rtol=1e-6
    )


def test_the_z_loss_is_trained_and_never_scored():
    plain, _ = scores(None, train=True)
    with_z, _ = scores(None, train=True, z_loss=0.1)
    expected = 0.1 * (logsumexp(LOGITS.astype(np.float64), -1) ** 2).mean()
    np.testing.assert_allclose(with_z.mean - plain.mean, expected, rtol=1e-5)
    np.testing.assert_array_equal(scores(None, train=False, z_loss=0.1)[0].total, scores(None, train=False)[0].total)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_only_answers_are_learned_and_scored(skip):
    asks, row = 3, L - 1
    batch = Batch(np.where(np.arange(L) == 1, asks, TARGETS % 3), TARGETS, np.ones((B, L), np.float32))
    given = {"model": Decoder(), "rng": jax.random.key(0), "byte_lengths": jnp.asarray(BYTES)}
    place = 1 + skip
    nll = -np.take_along_axis(log_softmax(LOGITS.astype(np.float64), -1), TARGETS[..., None], -1)[..., 0]
    for train in (True, False):
        objective = NextToken(after=asks, skip=skip)
        loss, metrics = objective.loss(lambda *_: Predictions(jnp.asarray(LOGITS)), None, batch, train=train, **given)
        assert loss.weight == (B if place <= row else 0)
        np.testing.assert_allclose(loss.total, nll[:, place].sum() if place <= row else 0.0, rtol=1e-6)
    if place <= row:
        np.testing.assert_allclose(metrics["accuracy"].mean, (LOGITS.argmax(-1) == TARGETS)[:, place].mean(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_the_cross_entropy_to_the_softened_target(smoothing):
    given = {"model": Decoder(), "rng": jax.random.key(0), "byte_lengths": jnp.asarray(BYTES), "train": True}
    batch = Batch(TARGETS, TARGETS)
    loss, _ = NextToken(smoothing=smoothing).loss(lambda *_: Predictions(jnp.asarray(LOGITS)), None, batch, **given)
    softened = smoothing / V + (1 - smoothing) * np.eye(V)[TARGETS]
    np.testing.assert_allclose(loss.mean, -(softened * log_softmax(LOGITS.astype(np.float64), -1)).sum(-1).mean(), rtol=1e-6)
