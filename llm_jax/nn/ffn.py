"""Feed-forward networks: plain, gated (Shazeer 2020), or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.config import Config, require, require_positive
from llm_jax.core.sharding import constrain
from llm_jax.nn.activations import ACTIVATIONS, Activation
from llm_jax.nn.dropout import dropout
from llm_jax.nn.linear import Linear, project


@dataclass(frozen=True)
class FeedForward(Config):
    """What each layer does to every position alone. branches: projections into the hidden units."""

    abstract = True
    branches = 0
    bias = False
    rowwise = True  # whether rows are worked on each for itself
    causal = True  # whether a token's output depends on no later token

    def hidden(self, width: int) -> int:
        """Hidden units of a model of that width; of them those that one token uses."""
        return 0

    def build(self, gain: float, dtype: Any, name: str) -> nn.Module:
        """The module `(x [B, L, D], dropout rates, valid [B, L] or None) -> [B, L, D]`; gain: of its last matrix."""
        return MLP(self, gain, dtype, name=name)

    def idle(self, width: int) -> int:
        """Trainable scalars that one token does not use."""
        return 0

    def entries(self, width: int) -> int:
        """Entries of matrices that multiply one token."""
        return (self.branches + 1) * width * self.hidden(width)

    def parameters(self, width: int) -> int:
        """Trainable scalars."""
        return self.entries(width) + (self.branches * self.hidden(width) + width if self.bias else 0)


@dataclass(frozen=True)
class Dense(FeedForward):
    """W₂ f(W₁ x), with ratio × width hidden units, or exactly so many `units`."""

    ratio: float = 4.0
    units: int | None = None
    activation: Activation = "gelu"
    bias: bool = False

    branches = 1

    def validate(self):
        require_positive(self, "ratio", "units")

    def hidden(self, width: int) -> int:
        return self.units or max(round(self.ratio * width), 1)


@dataclass(frozen=True)
class Gated(FeedForward):
    """W₂ (f(W x) ⊙ V x): GLU with sigmoid, ReGLU, GEGLU, SwiGLU with silu. Ratio 8/3 has the parameters of a plain 4.

    units: hidden units, exactly so many whatever ratio and multiple say.
    """

    ratio: float = 8 / 3
    units: int | None = None
    activation: Activation = "silu"
    bias: bool = False
    multiple: int = 1  # hidden units are rounded up to a multiple

    branches = 2

    def validate(self):
        require_positive(self, "ratio", "units", "multiple")

    def hidden(self, width: int) -> int:
        return self.units or -(-round(self.ratio * width) // self.multiple) * self.multiple


@dataclass(frozen=True)
class NoFeedForward(FeedForward):
    """Attention alone."""


class MLP(nn.Module):
    """`[B, L, D] -> [B, L, D]` of a plain or gated feed-forward network. gain: of the second matrix's initialisation."""

    config: Dense | Gated
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, rates: Mapping[str, Any], valid_BL: jax.Array | None = None) -> jax.Array:
        c, width = self.config, x_BLD.shape[-1]
        hidden = c.hidden(width)
        require(hidden > 0, "ffn.ratio", "leaves no hidden unit: raise it")

        def up(name: str) -> Linear:
            return Linear((width,), (hidden,), ("embed", "hidden"), bias=c.bias, dtype=self.dtype, name=name)

        gate, *rest = project(x_BLD, *(up(name) for name in (("gate", "up") if c.branches == 2 else ("up",))))
        h_BLF = ACTIVATIONS[c.activation](gate)
        if rest:
            h_BLF = h_BLF * rest[0]
        h_BLF = constrain(h_BLF, "batch", "length", "hidden_act")
        if "ffn" in rates:
            h_BLF = dropout(h_BLF, rates["ffn"], self.make_rng("dropout"))
        return Linear((hidden,), (width,), ("hidden", "embed"), gain=self.gain, bias=c.bias, dtype=self.dtype, name="down")(h_BLF)
