"""Token embeddings, and the same table as the output layer where the two are tied (Press & Wolf 2017)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.sharding import constrain, partitioned
from llm_jax.nn.kernels.product import product


class Embedding(nn.Module):
    """A table `[V, D]`. unit: deviation of the entries that enter the model; scaled: they are stored divided by √D and
    multiplied by it on the way in (Vaswani et al. 2017, §3.4), so that the tied output layer is of the right size too."""

    vocabulary: int
    width: int
    unit: float
    scaled: bool
    dtype: Any

    def setup(self):
        self.factor = self.width**0.5 if self.scaled else 1.0
        init = partitioned(nn.initializers.normal(self.unit / self.factor), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocabulary, self.width), jnp.float32)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """`[B, L, D]`."""
        # gathered over the embedding axis first: a lookup in a table that is split both ways would replicate its result
        x_BLD = constrain(self.embedding.astype(self.dtype), "vocab", None)[tokens_BL]
        return x_BLD * self.factor if self.scaled else x_BLD

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """`[B, L, V]` float32: the product with every row of the table."""
        return product(x_BLD.astype(self.dtype), self.embedding.astype(self.dtype).T, result=jnp.float32)
