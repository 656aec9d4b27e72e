"""How tokens are chosen, against a plain rewrite in NumPy that renormalizes after every cut, and by frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.infer.sampling import Greedy, Sample, join, split

LOGITS = np.array([[1.0, 3.0, -2.0, 2.5, 0.0, 2.9], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
WAYS = {
    "all": Sample(),
    "hot": Sample(temperature=2.0),
    "top-k": Sample(top_k=3),
    "top-k of one": Sample(top_k=1),
    "top-k beyond the vocabulary": Sample(top_k=50),
    "top-p": Sample(top_p=0.7),
    "top-p of one": Sample(top_p=1e-6),
    "top-p of all": Sample(top_p=1.0),
    "min-p": Sample(min_p=0.5),
    "top-p is of what top-k leaves": Sample(top_k=3, top_p=0.65),
    "top-p is at the temperature": Sample(temperature=0.3, top_p=0.7),
    "together": Sample(temperature=0.8, top_k=4, top_p=0.9, min_p=0.4),
}


def probabilities(way: Sample, logits: np.ndarray) -> np.ndarray:
    """Of one row, float64: every cut renormalizes what it leaves."""
    p = np.exp(logits / way.temperature)
    p /= p.sum()
    ranking = sorted(range(len(p)), key=lambda i: -p[i])
    if way.top_k is not None:
        for i in ranking[way.top_k :]:
            p[i] = 0
        p /= p.sum()
    if way.top_p is not None:
        kept, mass = set(), 0.0
        for i in ranking:
            if mass < way.top_p:
                kept.add(i)
            mass += p[i]
        p = np.array([p[i] if i in kept else 0 for i in range(len(p))])
        p /= p.sum()
    if way.min_p is not None:
        p[p < way.min_p * p.max()] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("name", WAYS)
def test_frequencies_are_those_of_the_rewrite(name):
    way, draws = WAYS[name], 20_000
    tokens = jax.jit(way)(jnp.repeat(jnp.asarray(LOGITS, jnp.float32), draws, 0), jax.random.key(1)).reshape(2, draws)
    for row, logits in zip(np.asarray(tokens), LOGITS, strict=True):
        expected = probabilities(way, logits)
        found = np.bincount(row, minlength=6) / draws
        assert (found[expected == 0] == 0).all(), "a token that is cut off was drawn"
        np.testing.assert_allclose(found, expected, atol=4.5 * 0.5 / draws**0.5)


def test_the_support_of_many_random_rows_is_that_of_the_rewrite():
    way = Sample(temperature=0.9, top_k=12, top_p=0.8, min_p=0.05)
    logits = np.random.default_rng(0).normal(size=(64, 40)) * 3
    scores = np.sort(logits / way.temperature, -1)[:, ::-1].astype(np.float32)
    kept = np.isfinite(way._kept(jnp.asarray(scores))).sum(-1)
    assert kept.tolist() == [(probabilities(way, row) > 0).sum() for row in logits]


def test_greedy_takes_the_first_of_the_most_probable():
    assert Greedy()(jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]]), jax.random.key(0)).tolist() == [1, 0]


def test_numbers_can_be_taken_out_and_put_back():
    way = Sample(temperature=0.7, top_k=3)
    blank, values = split(way)
    assert join(blank, values) == way and blank == split(Sample(temperature=0.1, top_k=9))[0]
    assert blank != split(Sample(temperature=0.7))[0], "a cut more is another program"
    drawn = jax.jit(lambda values: join(blank, values)(jnp.asarray(LOGITS), jax.random.key(2)))(values)
    assert drawn.tolist() == way(jnp.asarray(LOGITS), jax.random.key(2)).tolist()


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"top_k": 0}, "top_k must be > 0, got 0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"min_p": -0.1}, "min_p must be in"),
    ],
)
def test_numbers_out_of_bounds_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Sample(**given)
