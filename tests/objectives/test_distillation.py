"""Distillation against its definition in float64, by blocks and at once, and where there is nothing to be learned."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch, Predictions
from llm_jax.lab.components import Attention, Decoder, LanguageModel, MultiToken
from llm_jax.models.model import initial_parameters
from llm_jax.models.predict import predict
from llm_jax.objectives.distillation import Distillation
from llm_jax.objectives.next_token import NextToken

V, WIDER = 29, 31  # the teacher has rows for two ids more than there are
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (2, 10)).astype(np.int32)
WEIGHTS = np.float32(RNG.random((2, 9)) < 0.7)
BATCH = Batch(IDS[:, :-1], IDS[:, 1:], WEIGHTS)
STUDENT = Decoder(width=8, depth=1, attention=Attention(heads=2))
TEACHER = Decoder(
    width=16, depth=2, attention=Attention(heads=4), head=LanguageModel(tied=False, bias=True, soft_cap=4.0, multiplier=2.0)
)


def parameters(model, vocabulary, seed):
    start = initial_parameters(model, vocabulary, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.float32(rng.normal(0, 0.3, x.shape)), start)


OWN, TAUGHT = parameters(STUDENT, V, 0), parameters(TEACHER, WIDER, 1)


def loss(objective, params, *, model=STUDENT, teacher=TEACHER, vocabulary=WIDER, taught=TAUGHT, train=True):
    def apply(params, batch, rng):
        said = predict(model, V, params, batch, rng, train=train)
        return replace(said, teacher=predict(teacher, vocabulary, taught, batch, rng, train=False)) if train else said

    given = {"model": model, "rng": jax.random.key(1), "byte_lengths": jnp.ones(V), "train": train}
    return objective.loss(apply, params, BATCH, **given)[0]


def logits(model, vocabulary, params):
    return np.float64(predict(model, vocabulary, params, BATCH, jax.random.key(0), train=False).logits)


def defined(weight, temperature, top_k, smoothing):
    """The mean loss, in float64."""
    z, teacher = logits(STUDENT, V, OWN), logits(TEACHER, WIDER, TAUGHT)[..., :V]
    log_p, log_q = (log_softmax(x / temperature, -1) for x in (z, teacher))
    if top_k is not None:
        ids = np.argsort(-teacher, -1)[..., :top_k]
        others = np.ones(z.shape, bool)
        np.put_along_axis(others, ids, False, -1)
        log_p, log_q = (
            np.concatenate([np.take_along_axis(x, ids, -1), logsumexp(np.where(others, x, -np.inf), -1, keepdims=True)], -1)
            for x in (log_p, log_q)
        )
    divergence = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    hot = np.eye(V)[IDS[:, 1:]] * (1 - smoothing) + smoothing / V
    nll = -(hot * log_softmax(z, -1)).sum(-1)
    each = weight * temperature**2 * divergence + (1 - weight) * nll
    return (each * WEIGHTS).sum() / WEIGHTS.sum()


CASES = [(0.5, 1.0, None, 0.0), (0.3, 2.5, None, 0.1), (1.0, 1.0, 5, 0.0), (0.7, 2.0, 3, 0.0), (0.0, 1.0, None, 0.0)]


@pytest.mark.parametrize("given", CASES, ids=str)
def test_it_is_its_definition_at_once_and_by_blocks(given, monkeypatch):
    weight, temperature, top_k, smoothing = given
    objective = Distillation(weight=weight, temperature=temperature, top_k=top_k, smoothing=smoothing)

    def program():
        return jax.jit(jax.value_and_grad(lambda params: loss(objective, params).mean))

    (value, grads), text = program()(OWN), program().lower(OWN).as_text()
    np.testing.assert_allclose(value, defined(*given), rtol=2e-5)
    assert f"2x9x{V}xf32" in text
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, logits_at_once=4 * V, tokens_at_once=4))
    compiled = program().lower(OWN).compile()
    shapes = [f"f32[{rows},{ids}]" for rows in ("18", "20", "2,9", "5,4") for ids in (V, WIDER)]
    assert not any(shape in compiled.as_text() for shape in shapes), "neither's logits are ever there at once"
    blocked, by_blocks = compiled(OWN)
    np.testing.assert_allclose(blocked, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), by_blocks, grads)
    if weight == 0:
        np.testing.assert_allclose(value, loss(NextToken(), OWN).mean, rtol=1e-6)


@pytest.mark.parametrize("top_k", [None, 4, V - 1, V + 5])
def test_there_is_nothing_to_learn_from_oneself(top_k):
    objective = Distillation(weight=1.0, temperature=2.0, top_k=top_k)
    own = {"teacher": STUDENT, "vocabulary": V, "taught": OWN}
    value, grads = jax.jit(jax.value_and_grad(lambda params: loss(objective, params, **own).mean))(OWN)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    _, others = jax.jit(jax.value_and_grad(lambda params: loss(objective, params).mean))(OWN)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(others))
    assert all(float(jnp.abs(g).max()) < 1e-4 * largest for g in jax.tree.leaves(grads))


def test_later_tokens_are_learned_from_the_text_alone():
    model = replace(STUDENT, head=MultiToken(ahead=2))
    own = parameters(model, V, 2)
    unweighted = Distillation(ahead=0.5, weight=0.0), NextToken(ahead=0.5)
    totals = [loss(objective, own, model=model).total for objective in unweighted]
    np.testing.assert_allclose(*totals, rtol=1e-6)
    taught, alone = (loss(Distillation(ahead=ahead, weight=1.0), own, model=model).total for ahead in (0.5, 0.0))
    text, first = (loss(NextToken(ahead=ahead), own, model=model).total for ahead in (0.5, 0.0))
    np.testing.assert_allclose(taught - alone, text - first, rtol=1e-4)


def test_evaluation_is_that_of_next_token():
    np.testing.assert_array_equal(loss(Distillation(), OWN, train=False).total, loss(NextToken(), OWN, train=False).total)


def test_what_makes_no_sense_is_a_sentence():
    for fields, sentence in (
        ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_k": 0}, "top_k must be > 0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Distillation(**fields)
    given = {"model": STUDENT, "rng": None, "byte_lengths": jnp.ones(V), "train": True}
    with pytest.raises(ConfigError, match=r"objective.teacher 'x' has said nothing: Distillation\(\) is for `run`, take"):
        Distillation(teacher="x").loss(lambda *_: Predictions(jnp.zeros((2, 9, V))), None, BATCH, **given)
