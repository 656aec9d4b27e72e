"""The cache: what is written where, and what is dropped."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import cache
from llm_jax.nn.masks import Places

PLAIN = Places()


class Kept(nn.Module):
    """What is kept of `x [B, L, 1]`, and where its keys stand."""

    @nn.compact
    def __call__(self, x, index, places=PLAIN):
        return cache.extend(self, "x", x, index, 5), cache.keys(self, places, index, 5)


def test_entries_are_written_to_their_index_and_dropped_outside_the_slots():
    x = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    (kept, _), _ = Kept().apply({}, x, jnp.array([[-1, 0, 4], [5, 2, -3]]), mutable=["cache"])
    np.testing.assert_array_equal(kept[..., 0], [[2, 0, 0, 0, 3], [0, 0, 5, 0, 0]])


def test_keys_keep_the_prefix_and_the_position_that_came_with_them():
    x, kept = jnp.ones((2, 2, 1)), {}
    for start, prefix in ((0, True), (2, False)):
        places = Places(prefix=jnp.full((2, 2), prefix), position=jnp.array([[7, 8]]) + start)
        (_, keys), kept = Kept().apply(kept, x, jnp.array([[0, 1]]) + start, places, mutable=["cache"])
    assert keys.prefix.tolist() == [[True, True, False, False, False]] * 2 and keys.index is keys.segment is None
    assert keys.position.tolist() == [[7, 8, 9, 10, 0]]
