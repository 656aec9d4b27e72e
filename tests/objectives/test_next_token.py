"""The scores against sums written out in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from llm_jax.core import platform
from llm_jax.core.config import ConfigError, override
from llm_jax.core.types import Batch, Predictions
from llm_jax.lab.components import Attention, Brier, Decoder, Dropout, Focal, LanguageModel, MultiToken
from llm_jax.models.model import initial_parameters
from llm_jax.models.predict import predict
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
    metrics = NextToken().concluded(metrics)
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
    among = (np.argsort(-LOGITS, -1)[..., :5] == TARGETS[..., None]).any(-1)
    np.testing.assert_allclose(metrics["top5_accuracy"].mean, (among * counted).sum() / counted.sum(), rtol=1e-6)
    sure, gaps = np.exp(log_softmax(LOGITS.astype(np.float64), -1)).max(-1), 0.0
    for interval in range(15):
        inside = (sure * 15 // 1 == interval) * counted
        gaps += abs((inside * (sure - (LOGITS.argmax(-1) == TARGETS))).sum())
    np.testing.assert_allclose(metrics["calibration_error"].mean, gaps / counted.sum(), rtol=1e-5)


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


def test_an_answer_is_not_looked_for_in_the_next_document():
    segments = np.repeat([[0, 1]], B, 0).repeat(L // 2, 1)
    batch = Batch(
        np.where(np.arange(segments.shape[1]) == L // 2 - 1, 3, 0).repeat(B).reshape(-1, B).T, TARGETS[:, : segments.shape[1]]
    )
    batch = replace(batch, segments=segments)
    weights = [NextToken(after=3, skip=skip)._only(batch).weights.sum() for skip in (0, 1)]
    assert weights == [B, 0]


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_the_cross_entropy_to_the_softened_target(smoothing):
    given = {"model": Decoder(), "rng": jax.random.key(0), "byte_lengths": jnp.asarray(BYTES), "train": True}
    batch = Batch(TARGETS, TARGETS)
    loss, _ = NextToken(smoothing=smoothing).loss(lambda *_: Predictions(jnp.asarray(LOGITS)), None, batch, **given)
    softened = smoothing / V + (1 - smoothing) * np.eye(V)[TARGETS]
    np.testing.assert_allclose(loss.mean, -(softened * log_softmax(LOGITS.astype(np.float64), -1)).sum(-1).mean(), rtol=1e-6)


def test_the_criterion_is_trained_and_the_cross_entropy_scored():
    batch = Batch(TARGETS, TARGETS)
    given = {"model": Decoder(), "rng": jax.random.key(0), "byte_lengths": jnp.asarray(BYTES)}
    apply = lambda *_: Predictions(jnp.asarray(LOGITS))  # noqa: E731
    p = np.exp(log_softmax(LOGITS.astype(np.float64), -1))
    objective = NextToken(criterion=Brier(), z_loss=0.1)
    trained = objective.loss(apply, None, batch, train=True, **given)[0].mean
    expected = ((p - np.eye(V)[TARGETS]) ** 2).sum(-1).mean() + 0.1 * (logsumexp(LOGITS.astype(np.float64), -1) ** 2).mean()
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
    scored = objective.loss(apply, None, batch, train=False, **given)[0].mean
    np.testing.assert_array_equal(scored, NextToken().loss(apply, None, batch, train=False, **given)[0].mean)
    assert override(NextToken(), {"criterion": Focal(gamma=3.0)}).criterion == Focal(gamma=3.0)


def test_smoothing_belongs_to_the_cross_entropy():
    with pytest.raises(ConfigError, match=r"softens the target of CrossEntropy\(\): set it to 0 with Focal\(\)"):
        NextToken(criterion=Focal(), smoothing=0.1)


# ── by blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────
WORDS = 29
SIZE = {"width": 8, "depth": 1, "attention": Attention(heads=2), "dropout": Dropout(residual=0.1)}
CASES = {
    "tied, smoothed": (Decoder(**SIZE), NextToken(smoothing=0.1, z_loss=0.01)),
    "untied, focal": (
        Decoder(**SIZE, head=LanguageModel(tied=False, bias=True, soft_cap=4.0, multiplier=2.0, transform="gelu")),
        NextToken(criterion=Focal(gamma=2.0), z_loss=0.01),
    ),
    "ahead, brier": (Decoder(**SIZE, head=MultiToken(ahead=2)), NextToken(criterion=Brier(), ahead=0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_tokens_say_what_all_at_once_do(name, monkeypatch):
    """The loss in training, its gradient for every parameter, and the scores."""
    model, objective = CASES[name]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, WORDS, (2, 10)).astype(np.int32)
    weights = np.float32(rng.random((2, 9)) < 0.7)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, segments=np.repeat([[0, 1]], [4, 5], 1).repeat(2, 0).astype(np.int32))
    params = initial_parameters(model, WORDS, jax.random.key(0))
    given = {"model": model, "rng": jax.random.key(1), "byte_lengths": jnp.ones(WORDS)}

    def loss(params, train):
        apply = lambda *said: predict(model, WORDS, *said, train=train)  # noqa: E731
        return objective.loss(apply, params, batch, train=train, **given)

    def program():
        return jax.jit(lambda params: (jax.value_and_grad(lambda p: loss(p, True)[0].mean)(params), loss(params, False)))

    whole, text = program()(params), program().lower(params).as_text()
    assert f"18x{WORDS}xf32" in text or f"2x9x{WORDS}xf32" in text
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, logits_at_once=4 * WORDS, tokens_at_once=4))
    compiled = program().lower(params).compile()
    assert not any(f"{shape},{WORDS}]" in compiled.as_text() for shape in ("f32[18", "f32[2,9", "f32[5,4", "f32[20"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), compiled(params), whole)
