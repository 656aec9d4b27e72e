"""Positional schemes. A scheme may add to the embeddings, rotate queries and keys, or bias the attention scores.

To add one: a frozen dataclass here that overrides what it needs, and a row in `tests/nn/test_position.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, ConfigError, require, require_positive
from llm_jax.core.sharding import partitioned

Param = Callable[..., jax.Array]  # (name, initializer, shape, logical axes) -> array


@dataclass(frozen=True)
class Position(Config):
    """What tells a Transformer the order of its tokens. Every hook's default is to do nothing."""

    abstract = True

    def parameters(self, width: int, heads: int) -> int:
        """Trainable scalars of a model of that width and so many heads."""
        return 0

    def embed(self, x_BLD: jax.Array, positions_BL: jax.Array, *, unit: float, param: Param) -> jax.Array:
        """The embedded tokens with positions added; `unit` is the deviation of a token embedding's entries."""
        return x_BLD

    def rotate(self, x_BLHK: jax.Array, positions_BL: jax.Array) -> jax.Array:
        """Queries or keys turned by their positions."""
        return x_BLHK

    @property
    def score_factor(self) -> float:
        """What scores are multiplied by besides 1/√K where only a part of each head is turned (MLA)."""
        return 1.0

    def shared(self, heads: int, *, param: Param) -> dict[str, jax.Array]:
        """Parameters that all layers share, made once."""
        return {}

    def bias(self, shared: dict[str, jax.Array], queries_BL: jax.Array, keys_BM: jax.Array, heads: int) -> jax.Array | None:
        """What is added to the scores, `[B or 1, H, L, M]` float32, for any block of query and key positions."""
        return None


@dataclass(frozen=True)
class NoPosition(Position):
    """None: a causal model can still count what it sees (Kazemnejad et al. 2023)."""


@dataclass(frozen=True)
class Sinusoidal(Position):
    """Fixed waves added to the embeddings: PE(p, 2i) = sin(p / θ^(2i/D)), PE(p, 2i+1) = cos. Vaswani et al. 2017, §3.5."""

    theta: float = 10_000.0

    def validate(self):
        require_positive(self, "theta")

    def embed(self, x_BLD, positions_BL, *, unit, param):
        width = x_BLD.shape[-1]
        angles = _angles(positions_BL, (width + 1) // 2, 2 / width, self.theta)
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions_BL.shape, -1)[..., :width]
        return x_BLD + (unit * waves).astype(x_BLD.dtype)


@dataclass(frozen=True)
class Learned(Position):
    """A table of `max_length` learned embeddings; longer sequences are an error. Gehring et al. 2017."""

    max_length: int = 1024

    def validate(self):
        require_positive(self, "max_length")

    def parameters(self, width, heads):
        return self.max_length * width

    def embed(self, x_BLD, positions_BL, *, unit, param):
        length = positions_BL.shape[-1]
        if length > self.max_length:
            raise ConfigError(f"must be at least the sequence length {length}, got {self.max_length}", "model.position.max_length")
        table = param("embedding", nn.initializers.normal(unit), (self.max_length, x_BLD.shape[-1]), ("position", "embed"))
        return x_BLD + table.astype(x_BLD.dtype)[positions_BL]


@dataclass(frozen=True)
class Rope(Position):
    """Pairs (i, i + K/2) of a head turned by the angle p·θ^(-2i/K), so scores depend on distances. Su et al. 2021.

    fraction: the part of each head that is turned (GPT-NeoX turns a quarter).
    """

    theta: float = 10_000.0
    fraction: float = 1.0

    def validate(self):
        require_positive(self, "theta", "fraction")
        require(self.fraction <= 1, "fraction", f"must be <= 1, got {self.fraction}")

    def rotate(self, x_BLHK, positions_BL):
        turned = int(x_BLHK.shape[-1] * self.fraction) // 2 * 2
        angles = _angles(positions_BL, turned // 2, 2 / turned, self.theta)[:, :, None]
        cos, sin = jnp.cos(angles).astype(x_BLHK.dtype), jnp.sin(angles).astype(x_BLHK.dtype)
        first, second, rest = jnp.split(x_BLHK, [turned // 2, turned], -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


@dataclass(frozen=True)
class Alibi(Position):
    """Scores fall linearly with distance, at a slope of its own for each head. Press et al. 2022."""

    def bias(self, shared, queries_BL, keys_BM, heads):
        distance = jnp.abs(queries_BL[:, :, None] - keys_BM[:, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes(heads), jnp.float32)[None, :, None, None] * distance[:, None]

    @staticmethod
    def slopes(heads: int) -> list[float]:
        """2^(-8i/H) for a power of two; otherwise those of the next smaller one, then every second of the next larger."""
        power = 2 ** math.floor(math.log2(heads))
        even = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        return even + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


@dataclass(frozen=True)
class T5Bias(Position):
    """A learned bias for each head and bucket of distance, exact when near and logarithmic when far. Raffel et al. 2020, §2.1."""

    buckets: int = 32
    max_distance: int = 128

    def validate(self):
        require(self.buckets >= 2, "buckets", f"must be >= 2, got {self.buckets}")
        require(
            self.max_distance > self.buckets // 2,
            "max_distance",
            f"must be > buckets / 2 = {self.buckets // 2}, got {self.max_distance}",
        )

    def parameters(self, width, heads):
        return self.buckets * heads

    def shared(self, heads, *, param):
        return {"embedding": param("embedding", nn.initializers.normal(0.02), (self.buckets, heads), ("buckets", "heads"))}

    def bucket(self, distance: jax.Array) -> jax.Array:
        """The bucket of a non-negative distance to the left; what lies to the right is in bucket 0."""
        exact = self.buckets // 2
        distance = jnp.maximum(distance, 0)
        far = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(self.max_distance / exact) * (self.buckets - exact)
        return jnp.where(distance < exact, distance, jnp.minimum(exact + far.astype(jnp.int32), self.buckets - 1))

    def bias(self, shared, queries_BL, keys_BM, heads):
        bucket_BLM = self.bucket(queries_BL[:, :, None] - keys_BM[:, None, :])
        # the gather's gradient scatters; a product with one-hot rows is as fast and its gradient is a product too
        return jnp.einsum("blmn,nh->bhlm", jax.nn.one_hot(bucket_BLM, self.buckets), shared["embedding"].astype(jnp.float32))


def _angles(positions_BL: jax.Array, count: int, step: float, theta: float) -> jax.Array:
    """`[B, L, count]` float32: position × θ^(-i·step)."""
    return positions_BL[..., None].astype(jnp.float32) * theta ** (-step * jnp.arange(count, dtype=jnp.float32))[None, None]


class Positions(nn.Module):
    """A scheme with its parameters."""

    config: Position

    def _param(self, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self.param(name, partitioned(init, axes), shape, jnp.float32)

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, positions_BL: jax.Array, *, unit: float, heads: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The embedded tokens with positions, and the parameters that the layers share."""
        return self.config.embed(x_BLD, positions_BL, unit=unit, param=self._param), self.config.shared(heads, param=self._param)
