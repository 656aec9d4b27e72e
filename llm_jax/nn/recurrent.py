"""The long short-term memory as a mixer: the recurrence that attention is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import require_positive
from llm_jax.core.sharding import partitioned
from llm_jax.nn.context import Context
from llm_jax.nn.linear import Linear, project
from llm_jax.nn.mixer import Mixer


@dataclass(frozen=True)
class LSTM(Mixer):
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000.

    (i, f, o, z) = W x_t + U h_{t-1} + b; c_t = σ(f) c_{t-1} + σ(i) tanh(z); h_t = σ(o) tanh(c_t). units: of the state, None is the
    width; where they differ, h is projected to the width. forget: what the forget gate's bias starts at (Jozefowicz et al. 2015).
    """

    units: int | None = None
    forget: float = 1.0

    def validate(self):
        require_positive(self, "units")

    def size(self, width: int) -> int:
        """Units of the state."""
        return self.units or width

    def build(self, position, gain, dtype, name):
        return Recurrence(self, gain, dtype, name=name)

    def parameters(self, width):
        return self.entries(width) + 4 * self.size(width)

    def entries(self, width):
        units = self.size(width)
        return 4 * units * (width + units) + (units * width if units != width else 0)

    def inner(self, width):
        return 8 * self.size(width)


class Recurrence(nn.Module):
    """`[B, L, D] -> [B, L, D]`, one time step after another; the state starts at zero in every document and passes over padding."""

    config: LSTM
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        c, (batch, _, width) = self.config, x_BLD.shape
        units = c.size(width)

        def gates(name: str, inputs: int, axis: str) -> Linear:
            return Linear((inputs,), (4, units), (axis, "gates", "hidden"), dtype=self.dtype, name=name)

        dtype = jnp.promote_types(self.dtype, jnp.float32)  # of the state, which sums over the whole row
        recurrent = gates("recurrent", units, "hidden_in").weights()[0].astype(dtype)
        start = jnp.zeros((4, units)).at[1].set(c.forget)
        bias = self.param(
            "bias", partitioned(lambda key, shape, dtype: start.astype(dtype), ("gates", "hidden")), (4, units), jnp.float32
        )
        s_BLGU = project(x_BLD, gates("input", width, "embed"))[0].astype(dtype) + bias[None, None]
        first = self.variable("cache", "state", jnp.zeros, (2, batch, units), dtype) if context.slots is not None else None
        state = jnp.zeros((2, batch, units), dtype) if first is None else first.value
        state, h_LBU = jax.lax.scan(_step(recurrent), state, (s_BLGU.swapaxes(0, 1), *_boundaries(context, x_BLD)))
        if first is not None:
            first.value = state
        h_BLU = h_LBU.swapaxes(0, 1).astype(self.dtype)
        if units == width:
            return h_BLU
        return Linear((units,), (width,), ("hidden", "embed"), gain=self.gain, dtype=self.dtype, name="projection")(h_BLU)


def _boundaries(context: Context, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For every step `[L, B, 1]`: whether a document starts there, and whether there is a token at all."""
    segment_BL = context.places.segment
    if segment_BL is None:
        length = x_BLD.shape[1]
        return jnp.zeros((length, 1, 1), bool), jnp.ones((length, 1, 1), bool)
    real_BL = segment_BL >= 0
    token_BL = jax.lax.cummax(jnp.where(real_BL, jnp.arange(segment_BL.shape[1])[None], -1), 1)  # the last one up to each place
    before_BL = jnp.pad(token_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    changes_BL = segment_BL != jnp.take_along_axis(segment_BL, jnp.maximum(before_BL, 0), 1)
    return (changes_BL & (before_BL >= 0) & real_BL).T[..., None], real_BL.T[..., None]


def _step(recurrent_UGU: jax.Array):
    def step(state, given):
        s_BGU, starts_B1, valid_B1 = given
        c_BU, h_BU = jnp.where(starts_B1, 0, state)
        i, f, o, z = jnp.moveaxis(s_BGU + jnp.einsum("bu,ugv->bgv", h_BU, recurrent_UGU), 1, 0)
        new_c = jax.nn.sigmoid(f) * c_BU + jax.nn.sigmoid(i) * jnp.tanh(z)
        new_h = jax.nn.sigmoid(o) * jnp.tanh(new_c)
        state = jnp.where(valid_B1, jnp.stack([new_c, new_h]), jnp.stack([c_BU, h_BU]))
        return state, state[1]

    return step
