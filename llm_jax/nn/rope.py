"""How fast rotary embeddings turn: inverse frequencies, their scalings to texts longer than those trained on, and angles.

To add a scaling: a frozen dataclass here below `Scaling`, and a row in `tests/nn/test_position.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import Config, require, require_positive


def inverse_frequencies(theta: float, size: int) -> np.ndarray:
    """θ^(-2i/size), the radians per place of the pair i, float64 `[size / 2]`. Su et al. 2021."""
    return theta ** (-np.arange(0, size, 2) / size)


def angles(positions_BL: jax.Array, frequencies: np.ndarray | jax.Array) -> jax.Array:
    """Positions × frequencies up to whole turns, float32 `[B, L, size / 2]`.

    A float32 product is not enough: at index 131,071 its cosines are off by 0.006 to 0.009 (θ from 10,000 to 500,000, 128 channels,
    against float64; PyTorch's float32, which Hugging Face's models use, is as far off). Known frequencies are therefore counted in
    2^-32 of a turn: int32 products wrap, which drops whole turns and nothing else, and the cosines of every int32 index are off by
    less than 5e-7. Traced frequencies are multiplied plainly: they are rounded to float32 before they arrive here.
    """
    places_BL1 = jnp.asarray(positions_BL, jnp.int32)[..., None]
    if isinstance(frequencies, jax.Array):
        return places_BL1.astype(jnp.float32) * frequencies
    steps = frequencies * (2.0**32 / (2 * math.pi))
    whole = np.round(steps)
    wrapped = places_BL1 * whole.astype(np.int64).astype(np.int32)[None, None]
    rest = places_BL1.astype(jnp.float32) * (steps - whole).astype(np.float32)[None, None]
    return (wrapped.astype(jnp.float32) + rest) * np.float32(2 * math.pi / 2.0**32)


@dataclass(frozen=True)
class Scaling(Config):
    """How a rotary embedding is changed for texts up to `factor` times as long as those it was trained on."""

    abstract = True

    factor: float = 4.0

    def validate(self):
        require(self.factor >= 1, "factor", f"must be >= 1, got {self.factor}")

    def frequencies(self, theta: float, size: int, positions_BL: jax.Array) -> np.ndarray | jax.Array:
        """Radians per place of each pair of `size` channels: float64 `[size / 2]`, or traced float32 `[B or 1, 1, size / 2]`."""
        raise NotImplementedError

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by, in queries and in keys."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """What the scores of a layer that turns only a part of each head (MLA) are multiplied by besides."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Places divided by the factor, so that none is beyond what was trained on: position interpolation. Chen et al. 2023."""

    def frequencies(self, theta, size, positions_BL):
        return inverse_frequencies(theta, size) / self.factor


@dataclass(frozen=True)
class NtkScaling(Scaling):
    """θ' = θ · factor^(d/(d-2)): the slowest pair is slowed by the factor, the fastest not at all. bloc97 2023, "NTK-aware"."""

    def frequencies(self, theta, size, positions_BL):
        return inverse_frequencies(theta, size) * self.factor ** -_slowing(size)


@dataclass(frozen=True)
class DynamicScaling(Scaling):
    """NTK-aware with the factor that the sequence at hand needs: factor · n / original_length - (factor - 1). emozilla 2023.

    n is the largest index of a row + 1, or original_length if that is more; a traced number, so no length compiles anew.
    Keys that were kept from a shorter sequence are turned otherwise than new ones: scores depend on distances only within a call.
    """

    original_length: int = 2048

    def validate(self):
        super().validate()
        require_positive(self, "original_length")

    def frequencies(self, theta, size, positions_BL):
        length_B = jnp.max(jnp.asarray(positions_BL), -1) + 1
        # 1 + factor · (excess / original): exact where there is no excess, and better than the difference of two large numbers
        excess_B = jnp.maximum(length_B - self.original_length, 0).astype(jnp.float32)
        stretch_B11 = (1 + self.factor / self.original_length * excess_B)[:, None, None]
        slowing = (-_slowing(size)).astype(np.float32)[None, None]
        return inverse_frequencies(theta, size).astype(np.float32)[None, None] * stretch_B11**slowing


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """Slow pairs are interpolated, fast ones kept, with a ramp between; attention is sharpened. Peng et al. 2023 (YaRN).

    beta_fast, beta_slow: pairs that turn at least / at most that often within original_length are kept / interpolated. truncate:
    the ramp's ends are rounded outwards to whole pairs. attention_factor: the amplitude; None is m(mscale) / m(mscale_all_dim),
    or m(1) where these are not given, with m(a) = 0.1 · a · ln(factor) + 1. mscale_all_dim: multiplies the scores of an MLA layer
    by m² (DeepSeek-AI 2024, DeepSeek-V2's code).
    """

    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def validate(self):
        super().validate()
        require_positive(self, "original_length", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        require(self.beta_fast > self.beta_slow, "beta_fast", f"must be > beta_slow = {self.beta_slow}, got {self.beta_fast}")
        # with one of the two alone, published codes disagree about the amplitude
        together = (self.mscale is None) == (self.mscale_all_dim is None) or self.attention_factor is not None
        require(together, "mscale", "needs mscale_all_dim and the other way round, or an attention_factor that is used instead")

    def frequencies(self, theta, size, positions_BL):
        kept = inverse_frequencies(theta, size)
        low, high = self._ramp(theta, size)
        slowed = np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
        return kept * (1 - slowed) + kept / self.factor * slowed

    def _ramp(self, theta: float, size: int) -> tuple[float, float]:
        """The pairs between which interpolation sets in."""

        def pair(turns: float) -> float:  # that turns so often within original_length
            return size * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        return low, high if high != low else high + 0.001

    def _sharpening(self, share: float) -> float:
        return 0.1 * share * math.log(self.factor) + 1

    @property
    def amplitude(self):
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._sharpening(1.0)
        return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)

    @property
    def score_factor(self):
        return 1.0 if self.mscale_all_dim is None else self._sharpening(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Pairs that turn less than low_frequency times within original_length are interpolated, those that turn more than
    high_frequency times are kept, with a ramp in the number of turns between. Grattafiori et al. 2024 (Llama 3.1's code)."""

    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def validate(self):
        super().validate()
        require_positive(self, "low_frequency", "original_length")
        require(
            self.high_frequency > self.low_frequency,
            "high_frequency",
            f"must be > low_frequency = {self.low_frequency}, got {self.high_frequency}",
        )

    def frequencies(self, theta, size, positions_BL):
        plain = inverse_frequencies(theta, size)
        turns = self.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


def _slowing(size: int) -> np.ndarray:
    """How much of the factor each pair of NTK-aware scaling gets, from none to all, as an exponent."""
    return np.arange(0, size, 2) / max(size - 2, 1)
