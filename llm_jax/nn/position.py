"""Positional schemes. A scheme may add to the embeddings, rotate queries and keys, or bias the attention scores.

To add one: a frozen dataclass here that overrides what it needs, and a row in `tests/nn/test_position.py` (CONTRIBUTING.md shows
one). Rotary embeddings' scalings to longer texts are in `nn/rope.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import Config, ConfigError, require, require_positive
from llm_jax.core.sharding import partitioned
from llm_jax.nn.rope import Scaling, angles, inverse_frequencies

ONE_HOT = 1 << 22  # numbers that a learned bias may write out at once, 16 MiB
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

    def _overrides(self, *hooks: str) -> bool:
        return any(getattr(type(self), hook) is not getattr(Position, hook) for hook in hooks)

    @property
    def added_to_embeddings(self) -> bool:
        """Whether it works before the first layer."""
        return self._overrides("embed")

    @property
    def shared_by_layers(self) -> bool:
        """Whether all layers share parameters of it."""
        return self._overrides("shared")

    @property
    def inside_attention(self) -> bool:
        """Whether it works on queries, keys or scores."""
        return self._overrides("rotate", "bias")

    @property
    def biases_scores(self) -> bool:
        """Whether something is added to the scores."""
        return self._overrides("bias")


@dataclass(frozen=True)
class NoPosition(Position):
    """None: a causal model can still count what it sees (Kazemnejad et al. 2023)."""


@dataclass(frozen=True)
class Sinusoidal(Position):
    """Fixed waves added to the embeddings: PE(p, 2i) = sin(p / θ^(2i/D)), PE(p, 2i+1) = cos. Vaswani et al. 2017, §3.5.

    interleaved: False has all sines first, then all cosines, of p / θ^(i / (D/2 - 1)): so in the paper's code (tensor2tensor)
    and in Whisper, where the slowest wave is exactly θ.
    """

    theta: float = 10_000.0
    interleaved: bool = True

    def validate(self):
        require_positive(self, "theta")

    def embed(self, x_BLD, positions_BL, *, unit, param):
        width = x_BLD.shape[-1]
        waves_BLD = self._interleaved(positions_BL, width) if self.interleaved else self._halves(positions_BL, width)
        return x_BLD + (unit * waves_BLD).astype(x_BLD.dtype)

    def _interleaved(self, positions_BL: jax.Array, width: int) -> jax.Array:
        angles_BLW = angles(positions_BL, inverse_frequencies(self.theta, width))
        waves_BLW2 = jnp.stack([jnp.sin(angles_BLW), jnp.cos(angles_BLW)], -1)
        return waves_BLW2.reshape(*positions_BL.shape, -1)[..., :width]

    def _halves(self, positions_BL: jax.Array, width: int) -> jax.Array:
        count = width // 2
        angles_BLW = angles(positions_BL, self.theta ** (-np.arange(count) / max(count - 1, 1)))
        waves_BLD = jnp.concatenate([jnp.sin(angles_BLW), jnp.cos(angles_BLW)], -1)
        return jnp.pad(waves_BLD, [(0, 0), (0, 0), (0, width % 2)])  # an odd channel has no wave


@dataclass(frozen=True)
class Learned(Position):
    """A table of `max_length` learned embeddings; longer sequences are an error. Gehring et al. 2017.

    offset: rows of the table before that of index 0 (BART and OPT have 2, which padding was to use).
    """

    max_length: int = 1024
    offset: int = 0

    def validate(self):
        require_positive(self, "max_length")
        require(self.offset >= 0, "offset", f"must be >= 0, got {self.offset}")

    def parameters(self, width, heads):
        return (self.max_length + self.offset) * width

    def embed(self, x_BLD, positions_BL, *, unit, param):
        length = positions_BL.shape[-1]
        if length > self.max_length:
            raise ConfigError(f"must be at least the sequence length {length}, got {self.max_length}", "model.position.max_length")
        shape = (self.max_length + self.offset, x_BLD.shape[-1])
        table = param("embedding", nn.initializers.normal(unit), shape, ("position", "embed"))
        return x_BLD + table.astype(x_BLD.dtype)[positions_BL + self.offset]


@dataclass(frozen=True)
class Rope(Position):
    """Pairs (i, i + K/2) of a head turned by the angle p·θ^(-2i/K), so scores depend on distances. Su et al. 2021.

    fraction: the part of each head that is turned (GPT-NeoX turns a quarter). scaling: how it is stretched to longer texts.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def validate(self):
        require_positive(self, "theta", "fraction")
        require(self.fraction <= 1, "fraction", f"must be <= 1, got {self.fraction}")
        require(
            self.scaling is None or self.theta > 1, "theta", f"must be > 1 for a scaling to tell fast from slow, got {self.theta}"
        )

    @property
    def score_factor(self):
        return 1.0 if self.scaling is None else self.scaling.score_factor

    def rotate(self, x_BLHK, positions_BL):
        turned = int(x_BLHK.shape[-1] * self.fraction) // 2 * 2
        require(turned > 0, "fraction", f"turns no pair of a head of {x_BLHK.shape[-1]}: use a larger one than {self.fraction}")
        cos_BL1W, sin_BL1W = (wave[:, :, None].astype(x_BLHK.dtype) for wave in self._waves(turned, positions_BL))
        first, second, rest = jnp.split(x_BLHK, [turned // 2, turned], -1)
        return jnp.concatenate([first * cos_BL1W - second * sin_BL1W, second * cos_BL1W + first * sin_BL1W, rest], -1)

    def _waves(self, size: int, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of every pair's angle, `[B, L, size / 2]` float32."""
        if self.scaling is None:
            angles_BLW = angles(positions_BL, inverse_frequencies(self.theta, size))
            return jnp.cos(angles_BLW), jnp.sin(angles_BLW)
        angles_BLW = angles(positions_BL, self.scaling.frequencies(self.theta, size, positions_BL))
        return self.scaling.amplitude * jnp.cos(angles_BLW), self.scaling.amplitude * jnp.sin(angles_BLW)


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
    """A learned bias for each head and bucket of distance, exact when near and logarithmic when far. Raffel et al. 2020, §2.1.

    bidirectional: the second half of the buckets is for keys to the right (encoders); otherwise they are all in bucket 0.
    """

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def validate(self):
        require(self.one_way >= 2, "buckets", f"must be >= 2 in each direction, got {self.buckets}")
        require(not self.bidirectional or self.buckets % 2 == 0, "buckets", f"must be even for two directions, got {self.buckets}")
        exact = self.one_way // 2
        require(self.max_distance > exact, "max_distance", f"must be > {exact}, the exact buckets, got {self.max_distance}")

    @property
    def one_way(self) -> int:
        """Buckets of one direction."""
        return self.buckets // 2 if self.bidirectional else self.buckets

    def parameters(self, width, heads):
        return self.buckets * heads

    def shared(self, heads, *, param):
        return {"embedding": param("embedding", nn.initializers.normal(0.02), (self.buckets, heads), ("buckets", "heads"))}

    def edges(self) -> list[int]:
        """The smallest distance in each bucket of one direction but the first; exact · (max_distance / exact)^(k / far) when far.

        Compared as whole numbers, so that no logarithm's last digit moves a distance to another bucket.
        """
        exact = self.one_way // 2
        far = self.one_way - exact

        def first(k: int) -> int:
            near = int(exact * (self.max_distance / exact) ** (k / far))
            return next(d for d in itertools.count(near - 1) if d**far >= exact ** (far - k) * self.max_distance**k)

        return [*range(1, exact), *(first(k) for k in range(far))]

    def bucket(self, distance: jax.Array) -> jax.Array:
        """The bucket of each distance (query - key): positive to the left."""
        one_way = jnp.abs(distance) if self.bidirectional else jnp.maximum(distance, 0)
        bucket = jnp.searchsorted(jnp.asarray(self.edges(), jnp.int32), one_way, side="right", method="compare_all")
        return bucket + self.one_way * (distance < 0) if self.bidirectional else bucket

    def bias(self, shared, queries_BL, keys_BM, heads):
        # the gather's gradient scatters; a product with one-hot rows is as fast and its gradient is a product too
        @partial(jax.checkpoint, prevent_cse=False)
        def rows(queries_BL: jax.Array) -> jax.Array:
            bucket_BLM = self.bucket(queries_BL[:, :, None] - keys_BM[:, None, :])
            return jnp.einsum("blmn,nh->bhlm", jax.nn.one_hot(bucket_BLM, self.buckets), shared["embedding"])

        # so many queries at once that their one-hot rows, which are never kept, stay small
        (B, L), M = queries_BL.shape, keys_BM.shape[1]
        block = max(ONE_HOT // (max(B, keys_BM.shape[0]) * M * self.buckets), 1)
        if block >= L:
            return rows(queries_BL)
        blocks = jnp.pad(queries_BL, ((0, 0), (0, -L % block))).reshape(B, -1, block).swapaxes(0, 1)
        bias_nBHLM = jax.lax.map(rows, blocks)
        return jnp.moveaxis(bias_nBHLM, 0, 2).reshape(*bias_nBHLM.shape[1:3], -1, M)[:, :, :L]


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
