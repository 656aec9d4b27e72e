"""Positional schemes against their papers' formulas, written a second time and plainly."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.position import Alibi, Rope, Sinusoidal, T5Bias

RNG = np.random.default_rng(0)


def test_sinusoidal_is_the_papers_table():
    positions, width = np.array([[0, 1, 5, 100]]), 6
    got = Sinusoidal().embed(jnp.zeros((1, 4, width)), positions, unit=1.0, param=None)
    for column, p in enumerate(positions[0]):
        for i in range(width):
            angle = p / 10_000 ** (2 * (i // 2) / width)
            assert abs(float(got[0, column, i]) - (math.cos(angle) if i % 2 else math.sin(angle))) < 1e-5


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_turns_pairs_and_scores_depend_on_distance(fraction):
    scheme, size = Rope(fraction=fraction), 8
    q, k = RNG.normal(size=(2, 1, 1, 1, size)).astype(np.float32)

    def score(at_q, at_k):
        return float((scheme.rotate(q, np.array([[at_q]])) * scheme.rotate(k, np.array([[at_k]]))).sum())

    assert abs(score(7, 3) - score(104, 100)) < 1e-4 and abs(score(7, 3) - score(7, 4)) > 1e-4
    turned, half = int(size * fraction), int(size * fraction) // 2
    expected = q.astype(np.float64).copy()
    for i in range(half):
        angle = 3 * 10_000 ** (-2 * i / turned)
        a, b = q[0, 0, 0, i], q[0, 0, 0, i + half]
        expected[0, 0, 0, i] = a * math.cos(angle) - b * math.sin(angle)
        expected[0, 0, 0, i + half] = a * math.sin(angle) + b * math.cos(angle)
    np.testing.assert_allclose(scheme.rotate(q, np.array([[3]])), expected, atol=1e-5)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(Alibi.slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(Alibi.slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    bias = Alibi().bias({}, np.array([[4]]), np.array([[0, 3, 4]]), 2)
    np.testing.assert_allclose(bias[0, :, 0], [[-4 * 2**-4, -(2**-4), 0], [-4 * 2**-8, -(2**-8), 0]])


def test_t5_buckets_are_exact_near_and_logarithmic_far():
    scheme = T5Bias(buckets=32, max_distance=128)
    distances = np.arange(-3, 300)
    expected = []
    for d in np.maximum(distances, 0):
        expected.append(d if d < 16 else min(31, 16 + int(math.log(d / 16) / math.log(128 / 16) * 16)))
    got = np.asarray(scheme.bucket(distances))
    assert (got != np.array(expected)).sum() <= 2, "only a distance that lies on a bucket's edge may be rounded differently"
    table = RNG.normal(size=(32, 2)).astype(np.float32)
    bias = scheme.bias({"embedding": jnp.asarray(table)}, np.array([[200]]), np.array([[190, 200, 0]]), 2)
    np.testing.assert_allclose(bias[0, :, 0], table[[10, 0, 31]].T, rtol=1e-6)
