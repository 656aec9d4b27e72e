"""Normalization of the last axis, in float32 at least, whatever the compute dtype; "none" is a real choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require_positive
from llm_jax.core.sharding import partitioned
from llm_jax.nn.kernels.product import row_sum, widened

# pre: x + f(norm(x)); post: norm(x + f(x)), the original of 2017; sandwich: x + norm(f(norm(x)))
# parallel: x + Σ f(norm_f(x)); parallel_shared: x + Σ f(norm(x))
Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]


@dataclass(frozen=True)
class Norm(Config):
    """How activations are normalized."""

    abstract = True

    def vectors(self) -> dict[str, float]:
        """Name → initial value of each learned vector."""
        return {}

    def apply(self, x: jax.Array, vectors: dict[str, jax.Array]) -> jax.Array:
        """`[..., D] -> [..., D]`, float32 at least in and out; vectors `[1, …, D]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / √(variance + ε) · scale + bias. Ba, Kiros & Hinton 2016."""

    epsilon: float = 1e-5
    bias: bool = True

    def validate(self):
        require_positive(self, "epsilon")

    def vectors(self):
        return {"scale": 1.0} | ({"bias": 0.0} if self.bias else {})

    def apply(self, x, vectors):
        width = x.shape[-1]
        centred = x - row_sum(x) / width
        y = centred * jax.lax.rsqrt(row_sum(jnp.square(centred)) / width + self.epsilon) * vectors["scale"]
        return y + vectors["bias"] if self.bias else y


@dataclass(frozen=True)
class RMSNorm(Norm):
    """x / √(mean(x²) + ε) · scale. Zhang & Sennrich 2019.

    offset: multiplies by 1 + scale, and the scale starts at 0, so that weight decay pulls towards the plain norm (Gemma).
    """

    epsilon: float = 1e-6
    offset: bool = False

    def validate(self):
        require_positive(self, "epsilon")

    def vectors(self):
        return {"scale": 0.0 if self.offset else 1.0}

    def apply(self, x, vectors):
        scale = 1 + vectors["scale"] if self.offset else vectors["scale"]
        return x * jax.lax.rsqrt(row_sum(jnp.square(x)) / x.shape[-1] + self.epsilon) * scale


@dataclass(frozen=True)
class NoNorm(Norm):
    """The identity."""

    def apply(self, x, vectors):
        return x


class Normalize(nn.Module):
    """A norm with its learned vectors; computes in float32 at least and returns the dtype it was given."""

    config: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.config.vectors():
            return x
        vectors = {
            name: self.param(name, partitioned(nn.initializers.constant(value), ("norm",)), (x.shape[-1],), jnp.float32).reshape(
                (1,) * (x.ndim - 1) + (-1,)
            )
            for name, value in self.config.vectors().items()
        }
        wide = widened(x)
        return self.config.apply(wide, vectors).astype(x.dtype)
