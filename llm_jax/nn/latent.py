"""Multi-head latent attention (DeepSeek-V2, 2024, §2.1): keys and values from one narrow vector a token, all that is cached."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import require_positive
from llm_jax.core.sharding import constrain
from llm_jax.nn import cache
from llm_jax.nn.attention import Backend, Causal, Mask, attend
from llm_jax.nn.context import Context
from llm_jax.nn.kernels.product import product
from llm_jax.nn.linear import Linear
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.multihead import output, score_bias
from llm_jax.nn.normalization import Norm, Normalize, RMSNorm
from llm_jax.nn.position import Position


@dataclass(frozen=True)
class MLA(Mixer):
    """Attention whose keys and values are linear in a latent vector of `kv_rank` channels.

    A head's query and key have `nope_dim` channels without position and `rope_dim` with it; the latter part of the key is shared by
    all heads. q_rank: of the queries' own latent vector, None for none. norm: of the latent vectors. scale: of the scores,
    None is 1/√(nope_dim + rope_dim), times what the positional scheme asks for (YaRN). backend: as `Attention`'s.
    """

    attends = True

    heads: int = 4
    kv_rank: int = 64
    q_rank: int | None = None
    nope_dim: int = 32
    rope_dim: int = 16
    value_dim: int = 32
    mask: Mask = field(default_factory=Causal)
    norm: Norm = field(default_factory=RMSNorm)
    bias: bool = False
    scale: float | None = None
    backend: Backend = "auto"

    def validate(self):
        require_positive(self, "heads", "kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim", "scale")

    def build(self, position, gain, dtype, name):
        return LatentAttention(self, position, gain, dtype, name=name)

    def parameters(self, width):
        norms = len(self.norm.vectors()) * (self.kv_rank + (self.q_rank or 0))
        biases = ((self.q_rank or 0) + self.kv_rank + self.rope_dim + width) * self.bias
        return self.entries(width) + norms + biases

    def entries(self, width):
        query = self.heads * (self.nope_dim + self.rope_dim)
        queries = (width + query) * self.q_rank if self.q_rank else width * query
        keys = width * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return queries + keys + self.heads * self.value_dim * width

    def scores(self, width):
        return self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    def inner(self, width):
        return self.heads * (2 * (self.nope_dim + self.rope_dim) + self.value_dim) + (self.q_rank or 0) + self.kv_rank

    def cached(self, width):
        return self.kv_rank + self.rope_dim

    def turned(self, width):
        return self.rope_dim

    @property
    def causal(self):
        return self.mask.causal

    @property
    def heads_for_bias(self):
        return self.heads


class LatentAttention(nn.Module):
    """`[B, L, D] -> [B, L, D]`. gain: of the output projection's initialisation."""

    config: MLA
    position: Position
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        c, places = self.config, context.places
        index_BL = places.written(x_BLD.shape[1])
        q_BLHN, q_BLHR = self._queries(x_BLD, index_BL)
        c_BMC, k_BMR = self._latent(x_BLD, index_BL)
        keys = places
        if context.slots is not None:
            c_BMC = cache.extend(self, "latent", c_BMC, index_BL, context.slots)
            k_BMR = cache.extend(self, "key", k_BMR, index_BL, context.slots)
            keys = cache.keys(self, places, index_BL, context.slots)
        up = Linear(
            (c.kv_rank,),
            (c.heads, c.nope_dim + c.value_dim),
            ("latent", "heads", "head_dim"),
            dtype=self.dtype,
            name="kv_up",
        ).weights()[0]
        up_CHN, up_CHV = jnp.split(up, [c.nope_dim], -1)
        score_factor = self.position.score_factor / math.sqrt(c.nope_dim + c.rope_dim)
        given = {
            "mask": c.mask,
            "queries": places,
            "keys": keys,
            "bias": score_bias(self.position, context, c.heads),
            "scale": c.scale or score_factor,
            "rate": context.rates.get("attention", 0.0),
            "key": self.make_rng("dropout") if "attention" in context.rates else None,
            "backend": c.backend,
            "strict": context.slots is None,
        }
        if self.is_mutable_collection("intermediates"):  # each head's own, whichever form computes the result
            q_BLHK, k_BMHK = each_heads(q_BLHN, q_BLHR, product(c_BMC, up_CHN), k_BMR)
            self.sow("intermediates", "q_BLHK", q_BLHK)
            self.sow("intermediates", "k_BMGK", k_BMHK)
        form = absorbed if context.slots is not None and x_BLD.shape[1] == 1 else expanded
        out_BLHV = form(q_BLHN, q_BLHR, c_BMC, k_BMR, up_CHN, up_CHV, **given)
        return output(out_BLHV, x_BLD.shape[-1], gain=self.gain, bias=c.bias, dtype=self.dtype)

    def _queries(self, x_BLD: jax.Array, index_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The parts without and with position, `[B, L, H, nope_dim]` and `[B, L, H, rope_dim]`."""
        c, width = self.config, x_BLD.shape[-1]
        shape, axes = (c.heads, c.nope_dim + c.rope_dim), ("heads", "head_dim")
        if c.q_rank:
            down = Linear((width,), (c.q_rank,), ("embed", "latent"), bias=c.bias, dtype=self.dtype, name="query_down")
            h_BLC = Normalize(c.norm, name="query_norm")(down(x_BLD))
            q_BLHK = Linear((c.q_rank,), shape, ("latent", *axes), dtype=self.dtype, name="query_up")(h_BLC)
        else:
            q_BLHK = Linear((width,), shape, ("embed", *axes), dtype=self.dtype, name="query")(x_BLD)
        q_BLHN, q_BLHR = jnp.split(constrain(q_BLHK, "batch", "length", "heads_act", None), [c.nope_dim], -1)
        return q_BLHN, self.position.rotate(q_BLHR, index_BL)

    def _latent(self, x_BLD: jax.Array, index_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is cached: the normalized latent vector `[B, L, kv_rank]` and the turned common key `[B, L, rope_dim]`."""
        c, width = self.config, x_BLD.shape[-1]
        down = Linear((width,), (c.kv_rank + c.rope_dim,), ("embed", "latent"), bias=c.bias, dtype=self.dtype, name="kv_down")
        c_BLC, k_BLR = jnp.split(down(x_BLD), [c.kv_rank], -1)
        turned_BLR = self.position.rotate(k_BLR[:, :, None], index_BL)[:, :, 0]
        return Normalize(c.norm, name="kv_norm")(c_BLC), turned_BLR


def expanded(q_BLHN, q_BLHR, c_BMC, k_BMR, up_CHN, up_CHV, **given) -> jax.Array:
    """`[B, L, H, V]` through each head's own keys and values: fewest operations when there are many queries."""
    k_BMHN, v_BMHV = (product(c_BMC, up) for up in (up_CHN, up_CHV))
    return attend(*each_heads(q_BLHN, q_BLHR, k_BMHN, k_BMR), v_BMHV, **given)


def each_heads(q_BLHN, q_BLHR, k_BMHN, k_BMR) -> tuple[jax.Array, jax.Array]:
    """Whole queries `[B, L, H, K]` and keys `[B, M, H, K]`: the parts without and with position side by side."""
    k_BMHR = jnp.broadcast_to(k_BMR[:, :, None], (*k_BMHN.shape[:3], k_BMR.shape[-1]))
    return jnp.concatenate([q_BLHN, q_BLHR], -1), jnp.concatenate([k_BMHN, k_BMHR], -1)


def absorbed(q_BLHN, q_BLHR, c_BMC, k_BMR, up_CHN, up_CHV, **given) -> jax.Array:
    """The same with the keys' matrix moved to the query and the values' to the result (ibid., §2.1.2): one key head of
    kv_rank + rope_dim channels for all, so that decoding reads the cache as it is."""
    q_BLHC = jnp.einsum("blhn,chn->blhc", q_BLHN, up_CHN)
    q_BLHK = jnp.concatenate([q_BLHC, q_BLHR], -1)
    k_BM1K = jnp.concatenate([c_BMC, k_BMR], -1)[:, :, None]
    out_BLHC = attend(q_BLHK, k_BM1K, c_BMC[:, :, None], **given)
    return jnp.einsum("blhc,chv->blhv", out_BLHC, up_CHV)
