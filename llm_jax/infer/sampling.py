"""How the next token is chosen from its logits: pure functions `(logits [B, V], key) -> tokens [B]`, each a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive, substitute, traced, traced_values


@dataclass(frozen=True)
class Sampling(Config):
    """A way to choose."""

    abstract = True

    def __call__(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """`[B]` int32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Greedy(Sampling):
    """The most probable token; of several, the first."""

    def __call__(self, logits_BV, key):
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)


@dataclass(frozen=True)
class Sample(Sampling):
    """A draw from softmax(logits / temperature), cut to what is probable; the cuts apply in this order (as in transformers).

    top_k: the k most probable tokens (Fan et al. 2018). top_p: the fewest of what is left that together have this probability,
    among what is left (Holtzman et al. 2020, nucleus sampling). min_p: those that are at least so probable as this fraction of the
    most probable one (Nguyen et al. 2024). None: no cut. The most probable token always stays; of equal ones the first.
    """

    temperature: float = traced(1.0)
    top_k: int | None = traced(None)
    top_p: float | None = traced(None)
    min_p: float | None = traced(None)

    def validate(self):
        require(self.temperature > 0, "temperature", f"must be > 0, got {self.temperature}: take Greedy() for the limit 0")
        require_positive(self, "top_k")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", f"must be in [0, 1], got {self.min_p}")

    def __call__(self, logits_BV, key):
        scores_BV = logits_BV.astype(jnp.float32) / self.temperature
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return jax.random.categorical(key, scores_BV).astype(jnp.int32)
        order_BV = jnp.argsort(-scores_BV, -1, stable=True)
        kept_BV = self._kept(jnp.take_along_axis(scores_BV, order_BV, -1))
        rank_B = jax.random.categorical(key, kept_BV)
        return jnp.take_along_axis(order_BV, rank_B[:, None], -1)[:, 0].astype(jnp.int32)

    def _kept(self, scores_BV: jax.Array) -> jax.Array:
        """Descending scores, with -inf in place of those that are cut off."""
        rank_1V = jnp.arange(scores_BV.shape[-1])[None]
        if self.top_k is not None:
            scores_BV = jnp.where(rank_1V < self.top_k, scores_BV, -jnp.inf)
        if self.top_p is not None:
            p_BV = jax.nn.softmax(scores_BV)
            before_BV = jnp.cumsum(p_BV, -1) - p_BV
            scores_BV = jnp.where((before_BV < self.top_p) | (rank_1V == 0), scores_BV, -jnp.inf)
        if self.min_p is not None:
            scores_BV = jnp.where(scores_BV >= scores_BV[:, :1] + jnp.log(self.min_p), scores_BV, -jnp.inf)
        return scores_BV


def split(sampling: Sampling) -> tuple[Sampling, dict[str, Any]]:
    """The method without its numbers, and the numbers, which `join` puts back: a program serves all of them."""
    values = traced_values(sampling)
    return substitute(sampling, dict.fromkeys(values, 0)), values


def join(sampling: Sampling, values: dict[str, Any]) -> Sampling:
    """The inverse of `split`; the numbers may be traced."""
    return substitute(sampling, values)
