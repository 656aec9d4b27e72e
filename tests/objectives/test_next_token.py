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
