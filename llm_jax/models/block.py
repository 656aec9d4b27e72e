"""One Transformer layer: attention and a feed-forward network, each normalized and joined to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.sharding import constrain
from llm_jax.nn.dropout import dropout
from llm_jax.nn.ffn import MLP, NoFeedForward
from llm_jax.nn.multihead import MultiHead
from llm_jax.nn.normalization import Normalize
from llm_jax.nn.residual import Join


class Block(nn.Module):
    """`[B, L, D] -> ([B, L, D], None)`, the form that `nn.scan` takes. config: the `Decoder`'s."""

    config: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segments_BL, shared: Mapping[str, jax.Array], rates: Mapping[str, Any]):
        c = self.config
        gain = c.residual.shrinkage(c.depth)
        mixer = MultiHead(c.attention, c.position, gain, c.precision.dtype, name="attention")
        x_BLD = self._branch("attention", x_BLD, lambda h: mixer(h, segments_BL, shared, rates), rates)
        if not isinstance(c.ffn, NoFeedForward):
            mlp = MLP(c.ffn, gain, c.precision.dtype, name="ffn")
            x_BLD = self._branch("ffn", x_BLD, lambda h: mlp(h, rates), rates)
        return x_BLD, None

    def _branch(
        self, name: str, x_BLD: jax.Array, function: Callable[[jax.Array], jax.Array], rates: Mapping[str, Any]
    ) -> jax.Array:
        c = self.config

        def norm(role: str, x: jax.Array) -> jax.Array:
            return Normalize(c.norm, name=f"{role}_{name}")(x)

        h_BLD = function(x_BLD if c.placement == "post" else norm("norm", x_BLD))
        if "residual" in rates:
            h_BLD = dropout(h_BLD, rates["residual"], self.make_rng("dropout"))
        if c.placement == "sandwich":
            h_BLD = norm("norm_after", h_BLD)
        x_BLD = Join(c.residual, c.depth, name=f"residual_{name}")(x_BLD, h_BLD)
        return constrain(norm("norm", x_BLD) if c.placement == "post" else x_BLD, "batch", "length", "embed_act")
