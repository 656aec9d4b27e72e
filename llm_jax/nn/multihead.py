"""Multi-head attention (Vaswani et al. 2017), multi-query (Shazeer 2019) and grouped-query (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive
from llm_jax.core.sharding import constrain
from llm_jax.nn.attention import Bias, Places, attend
from llm_jax.nn.linear import Linear, project
from llm_jax.nn.position import Position


@dataclass(frozen=True)
class Attention(Config):
    """heads: of queries. kv_heads: of keys and values; None is one each (MHA), 1 is MQA. head_dim: None is width / heads."""

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False

    def validate(self):
        require_positive(self, "heads", "kv_heads", "head_dim")
        require(self.heads % self.groups == 0, "kv_heads", f"must divide heads={self.heads}, got {self.kv_heads}")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def size(self, width: int) -> int:
        """The dimension of one head."""
        return self.head_dim or width // self.heads


class MultiHead(nn.Module):
    """`[B, L, D] -> [B, L, D]`. gain: of the output projection's initialisation."""

    config: Attention
    position: Position
    gain: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        segments_BL: jax.Array | None,
        shared: Mapping[str, jax.Array],
        rates: Mapping[str, Any],
    ) -> jax.Array:
        c, width = self.config, x_BLD.shape[-1]
        # rotations matter by their differences alone, so the places in a row serve every document in it
        places_1L = jnp.arange(x_BLD.shape[1])[None]
        size = c.size(width)

        def linear(name: str, heads: int, axis: str) -> Linear:
            return Linear((width,), (heads, size), ("embed", axis, "head_dim"), bias=c.bias, dtype=self.dtype, name=name)

        queries = linear("query", c.heads, "heads")
        keys, values = (linear(name, c.groups, "kv_heads") for name in ("key", "value"))
        q_BLHK, k_BLGK, v_BLGK = project(x_BLD, queries, keys, values)
        q_BLHK = self.position.rotate(constrain(q_BLHK, "batch", "length", "heads_act", None), places_1L)
        k_BLGK = self.position.rotate(constrain(k_BLGK, "batch", "length", "kv_heads_act", None), places_1L)
        v_BLGK = constrain(v_BLGK, "batch", "length", "kv_heads_act", None)
        biased = type(self.position).bias is not Position.bias
        places = Places(segment=segments_BL)
        out_BLHK = attend(
            q_BLHK,
            k_BLGK,
            v_BLGK,
            queries=places,
            keys=places,
            bias=Bias(lambda params, a, b: self.position.bias(params, a, b, c.heads), dict(shared)) if biased else None,
            rate=rates.get("attention", 0.0),
            key=self.make_rng("dropout") if "attention" in rates else None,
        )
        out_BLHK = constrain(out_BLHK, "batch", "length", "heads_act", None)
        return Linear(
            (c.heads, size), (width,), ("heads", "head_dim", "embed"), gain=self.gain, bias=c.bias, dtype=self.dtype, name="output"
        )(out_BLHK)
