"""Token embeddings, and the same table as the output layer where the two are tied (Press & Wolf 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import Config, require, require_positive
from llm_jax.core.sharding import constrain, partitioned
from llm_jax.core.types import Weighted
from llm_jax.nn.kernels.product import product
from llm_jax.nn.kernels.unembedding import Unembedding
from llm_jax.nn.linear import Linear
from llm_jax.nn.normalization import Norm, Normalize

SMALL = 0.02  # deviation of entries that are not scaled, Radford et al. 2019


@dataclass(frozen=True)
class Embed(Config):
    """How token ids become vectors.

    scaled: the table is stored divided by √width and multiplied by it on the way in (Vaswani et al. 2017, §3.4), so that tokens
    enter with deviation 1, as the branches that are added to them have; without it they enter at 0.02, and the first branches
    drown them. rank: the table has so many columns, and a matrix takes them to the width (Lan et al. 2020, ALBERT). norm: of what
    enters (BLOOM, BERT). types: kinds of tokens with a learned vector each (BERT's segments).
    """

    scaled: bool = True
    rank: int | None = None
    norm: Norm | None = None
    types: int = 0

    def validate(self):
        require_positive(self, "rank")
        require(self.types >= 0, "types", f"must be >= 0, got {self.types}")

    @property
    def deviation(self) -> float:
        """Of the entries that enter the model."""
        return 1.0 if self.scaled else SMALL

    def parameters(self, width: int, vocabulary: int) -> int:
        """Trainable scalars."""
        columns = self.rank or width
        table = vocabulary * columns + (columns * width if self.rank else 0)
        return table + self.types * width + (width * len(self.norm.vectors()) if self.norm else 0)

    def entries(self, width: int, vocabulary: int) -> int:
        """Entries of matrices that multiply every token when the table is the output layer too."""
        return vocabulary * (self.rank or width) + (self.rank * width if self.rank else 0)


def neighbour_purity(table_VD: jax.Array, kinds_V: np.ndarray, count: int) -> dict[str, Weighted]:
    """How often a token's nearest in the table, by cosine, are of its kind, over all tokens that have one (>= 0) and among them.

    "neighbour_purity": the share of the `count` nearest, averaged over tokens. "neighbour_chance": what it would be, on average, if
    the rows were shuffled: (n - 1) / (N - 1) of a kind of n in N tokens. Nothing is larger than one block of rows × N.
    """
    (index_N,) = np.nonzero(kinds_V >= 0)
    kind_N, tokens = kinds_V[index_N], len(index_N)
    count = min(count, tokens - 1)
    if count < 1:
        return {name: Weighted.of(0.0, 0.0) for name in ("neighbour_purity", "neighbour_chance")}
    row_ND = table_VD[index_N].astype(jnp.float32)
    unit_ND = row_ND / jnp.maximum(jnp.linalg.norm(row_ND, axis=-1, keepdims=True), 1e-30)
    kind = jnp.asarray(kind_N)

    def share(place):
        nearest = jax.lax.top_k((unit_ND @ unit_ND[place]).at[place].set(-jnp.inf), count)[1]
        return (kind[nearest] == kind[place]).mean()

    shares_N = jax.lax.map(share, jnp.arange(tokens), batch_size=min(tokens, 256))
    sizes = np.bincount(kind_N)
    chance = float((sizes * (sizes - 1)).sum() / (tokens * (tokens - 1)))
    return {"neighbour_purity": Weighted.of(shares_N.mean(), tokens), "neighbour_chance": Weighted.of(chance, tokens)}


class Embedding(nn.Module):
    """A table `[V, D]`, or `[V, rank]` and a matrix `[rank, D]`."""

    config: Embed
    vocabulary: int
    width: int
    dtype: Any

    def setup(self):
        c, columns = self.config, self.config.rank or self.width
        self.factor = self.width**0.5 if c.scaled else 1.0
        # through the matrix, which keeps variance, a row of `columns` entries comes out with the deviation it goes in with
        init = partitioned(nn.initializers.normal(c.deviation / self.factor), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocabulary, columns), jnp.float32)
        if c.rank:
            self.projection = Linear((columns,), (self.width,), ("latent", "embed"), dtype=self.dtype)
        if c.types:
            types = partitioned(nn.initializers.normal(c.deviation), (None, "embed"))
            self.types = self.param("types", types, (c.types, self.width), jnp.float32)
        if c.norm:
            self.norm = Normalize(c.norm)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """`[B, L, D]`: rows of the table, before positions are added."""
        # gathered over the embedding axis first: a lookup in a table that is split both ways would replicate its result
        x_BLD = constrain(self.embedding.astype(self.dtype), "vocab", None)[tokens_BL]
        if self.config.rank:
            x_BLD = self.projection(x_BLD)
        return x_BLD * self.factor if self.config.scaled else x_BLD

    def finish(self, x_BLD: jax.Array, types_BL: jax.Array | None) -> jax.Array:
        """`[B, L, D]`: with the tokens' kinds (default: all of the first kind) and the norm, after positions were added."""
        if self.config.types:
            types_BL = jnp.zeros((1, x_BLD.shape[1]), jnp.int32) if types_BL is None else types_BL
            x_BLD = x_BLD + self.types.astype(x_BLD.dtype)[types_BL]
        return self.norm(x_BLD) if self.config.norm else x_BLD

    def unembedding(self, x_BLD: jax.Array) -> Unembedding:
        """The output layer that scores with every row of the table."""
        if self.config.rank:
            x_BLD = product(x_BLD, self.projection.weights()[0].T)
        return Unembedding(x_BLD.astype(self.dtype), self.embedding.astype(self.dtype), table=True)
