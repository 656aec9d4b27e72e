"""Which tokens of a document span corruption hides: how many, in how many spans, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import Config, require, require_positive
from llm_jax.objectives.rows import Documents


@dataclass(frozen=True)
class Denoiser(Config):
    """How much is hidden, and in what pieces: `rate` of the tokens, in spans of `mean_length` on average (None: one, at the end).

    Of a document of n tokens N = round(rate · n) are hidden, in S = round(N / mean_length) spans, at least one each; the spans, and
    what is between them, which comes first, are cut at random, all ways alike (Raffel et al. 2020, §3.1.4, as their code's
    `random_spans_noise_mask` has it). mode: a token in front of the input that says which denoiser it was (Tay et al. 2022, §3.1).
    share: how probable it is in a mixture, beside the others' shares.
    """

    rate: float = 0.15
    mean_length: float | None = 3.0
    mode: Literal["R", "S", "X"] | None = None
    share: float = 1.0

    def validate(self):
        require(0 < self.rate < 1, "rate", f"must be in (0, 1), got {self.rate}")
        whole = self.mean_length is None or self.mean_length >= 1
        require(whole, "mean_length", f"must be at least 1, got {self.mean_length}")
        require_positive(self, "share")

    def amounts(self, size_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hidden tokens and spans of documents of so many tokens; none where there is only one."""
        noise_N = np.clip(np.round(size_N * self.rate), 1, np.maximum(size_N - 1, 1)).astype(np.int32)
        spans_N = np.round(noise_N / (self.mean_length or np.inf)).astype(np.int32)
        spans_N = np.clip(spans_N, 1, np.maximum(np.minimum(noise_N, size_N - noise_N), 1))
        return np.where(size_N < 2, 0, noise_N), np.where(size_N < 2, 0, spans_N)


def noise_mask(key: jax.Array, docs: Documents, noise_D: jax.Array, spans_D: jax.Array) -> jax.Array:
    """`[L]` bool: in each document `noise` hidden tokens in `spans` spans, every mask that begins with a shown one alike.

    The shown tokens of a document and the hidden ones are two groups, each cut into `spans` parts: its first token begins one, and
    spans - 1 of the others, at random. The parts then take turns.
    """
    number_L, index_L = docs.number_L, jnp.arange(len(docs.number_L))
    shown_L = (docs.size_D - noise_D)[number_L]
    hidden_L = docs.place_L >= shown_L  # as if all of them stood at the end
    group_L = 2 * number_L + hidden_L
    first_L = docs.start_D[number_L] + hidden_L * shown_L  # of its group
    draw_L = jnp.where(index_L == first_L, -1.0, jax.random.uniform(key, index_L.shape))
    chosen_L = jnp.lexsort((draw_L, group_L))  # a group stays where it is, in random order
    begins_L = jnp.zeros(index_L.shape, bool).at[chosen_L].set(index_L - first_L < spans_D[number_L])
    count_L = jnp.cumsum(begins_L)
    return hidden_L[jnp.lexsort((hidden_L, count_L - count_L[first_L], number_L))]
