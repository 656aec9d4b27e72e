"""One row of a batch as documents that are taken apart and laid out anew: all in fixed shapes, for `jax.vmap` over rows."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llm_jax.core.types import Batch

Values = dict[str, jax.Array]


@dataclass(frozen=True)
class Documents:
    """The documents of a row of L tokens, of which there may be D (as many as tokens; 1 where the row is not packed).

    number_L: which document a token is of; place_L: where in it. start_D, size_D: where each begins, and its tokens.
    live_D: whether there is one, and it is neither padding nor without weight.
    """

    number_L: jax.Array
    place_L: jax.Array
    start_D: jax.Array
    size_D: jax.Array
    live_D: jax.Array

    @property
    def last_L(self) -> jax.Array:
        """Whether a token is the last of its document."""
        return self.place_L == self.size_D[self.number_L] - 1


def documents(row: Batch) -> Documents:
    """Those of one row, `[L]` arrays. A negative segment is padding."""
    (length,) = row.tokens.shape
    weights_L = jnp.ones(length, bool) if row.weights is None else row.weights > 0
    index_L = jnp.arange(length)
    if row.segments is None:
        one = jnp.ones(1, jnp.int32)
        return Documents(jnp.zeros(length, jnp.int32), index_L, 0 * one, length * one, weights_L.any()[None])
    number_L = jnp.cumsum(_begins(row.segments)) - 1
    size_D = jnp.zeros(length, jnp.int32).at[number_L].add(1)
    start_D = jnp.cumsum(size_D) - size_D
    live_D = jnp.zeros(length, bool).at[number_L].max(weights_L & (row.segments >= 0))
    return Documents(number_L, index_L - start_D[number_L], start_D, size_D, live_D)


def arranged(key_N: jax.Array, present_N: jax.Array, room: int, values: Values) -> tuple[Values, jax.Array]:
    """Those of N items that are present, in the order of their keys and, where these are equal, their own; the rest is zero.

    `[room]` arrays, and which of their places are filled.
    """
    order_N = jnp.argsort(jnp.where(present_N, key_N, jnp.iinfo(jnp.int32).max), stable=True)
    places_R = jnp.pad(order_N[:room], (0, max(room - len(order_N), 0)))
    filled_R = jnp.arange(room) < present_N.sum()
    taken = {name: value_N[places_R] for name, value_N in values.items()}
    return {name: jnp.where(filled_R, value_R, jnp.zeros_like(value_R)) for name, value_R in taken.items()}, filled_R


def position_in_segment(segments_R: jax.Array) -> jax.Array:
    """0, 1, … from the first token of each segment of a row."""
    index_R = jnp.arange(len(segments_R))
    return index_R - jax.lax.cummax(jnp.where(_begins(segments_R), index_R, 0))


def _begins(segments_R: jax.Array) -> jax.Array:
    """Whether a token is the first of its segment, `[R]` bool."""
    return jnp.concatenate([jnp.ones(1, bool), segments_R[1:] != segments_R[:-1]])


def predicting(ids_R: jax.Array, filled_R: jax.Array, segments_R: jax.Array, scored_R: jax.Array) -> Batch:
    """A row of R - 1 tokens, each of which predicts the one after it where that is of its segment and scored."""
    inside = filled_R[1:] & (segments_R[1:] == segments_R[:-1])
    segments = jnp.where(filled_R, segments_R, -1)[:-1]
    weights = (inside & scored_R[1:]).astype(jnp.float32)
    return Batch(ids_R[:-1], ids_R[1:], weights, segments, position_in_segment(segments))
