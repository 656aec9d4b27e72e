"""Multi-head attention (Vaswani et al. 2017), multi-query (Shazeer 2019) and grouped-query (Ainslie et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.config import require, require_positive
from llm_jax.core.sharding import constrain, partitioned
from llm_jax.nn import cache
from llm_jax.nn.attention import Backend, Bias, Causal, Mask, attend
from llm_jax.nn.context import Context, Memory
from llm_jax.nn.linear import Linear, project
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.normalization import Norm, Normalize
from llm_jax.nn.position import Position


@dataclass(frozen=True)
class Attention(Mixer):
    """softmax(QKᵀ) V over several heads.

    heads: of queries. kv_heads: of keys and values; None is one each (MHA), 1 is MQA. head_dim: None is width / heads.
    bias: on queries, keys and values; output_bias: None is as bias. qk_norm: of each head's queries and keys, before
    they are turned (Henry et al. 2020). soft_cap c: scores become c·tanh(score / c) (Gemma 2). sinks: a learned score per
    head that no value belongs to, in the softmax's denominator (gpt-oss). scale: of the scores, None is 1/√head_dim.
    backend: the kernel; with a cache, whose keys outnumber the queries, "auto" where it cannot.
    """

    attends = True

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask = field(default_factory=Causal)
    bias: bool = False
    output_bias: bool | None = None
    qk_norm: Norm | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    backend: Backend = "auto"

    def validate(self):
        require_positive(self, "heads", "kv_heads", "head_dim", "soft_cap", "scale")
        require(self.heads % self.groups == 0, "kv_heads", f"must divide heads={self.heads}, got {self.kv_heads}")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def size(self, width: int) -> int:
        """The dimension of one head."""
        return self.head_dim or width // self.heads

    def build(self, position, gain, dtype, name):
        return MultiHead(self, position, gain, dtype, name=name)

    def parameters(self, width):
        size = self.size(width)
        biases = (self.heads + 2 * self.groups) * size * self.bias + width * self.biased_output
        norms = 2 * size * len(self.qk_norm.vectors()) if self.qk_norm else 0
        return self.entries(width) + biases + norms + self.heads * self.sinks

    def entries(self, width):
        return width * 2 * (self.heads + self.groups) * self.size(width)

    def scores(self, width):
        return 2 * self.heads * self.size(width)

    def inner(self, width):
        return (self.heads + 2 * self.groups) * self.size(width)

    def cached(self, width):
        return 2 * self.groups * self.size(width)

    def turned(self, width):
        return self.size(width)

    @property
    def biased_output(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias if self.output_bias is None else self.output_bias

    @property
    def causal(self):
        return self.mask.causal

    @property
    def heads_for_bias(self):
        return self.heads


class MultiHead(nn.Module):
    """`[B, L, D] -> [B, L, D]`. gain: of the output projection's initialisation."""

    config: Attention
    position: Position
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, memory: Memory | None = None) -> jax.Array:
        """Self-attention, or cross-attention to `memory`."""
        c, places = self.config, context.places
        q_BLHK, k_BMGK, v_BMGK = self._project(x_BLD, memory)
        if c.qk_norm:
            q_BLHK, k_BMGK = Normalize(c.qk_norm, name="query_norm")(q_BLHK), Normalize(c.qk_norm, name="key_norm")(k_BMGK)
        if memory is None:
            # rotations matter by their differences alone, so the places in a row serve every document in it
            index_BL = places.written(x_BLD.shape[1])
            q_BLHK, k_BMGK = self.position.rotate(q_BLHK, index_BL), self.position.rotate(k_BMGK, index_BL)
        keys = places if memory is None else memory.places
        if context.slots is not None:
            if memory is None:
                k_BMGK = cache.extend(self, "keys", k_BMGK, index_BL, context.slots)
                v_BMGK = cache.extend(self, "values", v_BMGK, index_BL, context.slots)
                keys = cache.keys(self, places, index_BL, context.slots)
            else:  # the first call's, since an encoder's output does not change
                k_BMGK = self.variable("cache", "keys", lambda: k_BMGK).value
                v_BMGK = self.variable("cache", "values", lambda: v_BMGK).value
        self.sow("intermediates", "q_BLHK", q_BLHK)
        self.sow("intermediates", "k_BMGK", k_BMGK)
        out_BLHK = attend(
            q_BLHK,
            k_BMGK,
            v_BMGK,
            mask=c.mask,
            queries=places,
            keys=keys,
            bias=score_bias(self.position, context, c.heads) if memory is None else None,
            scale=c.scale,
            soft_cap=c.soft_cap,
            sinks_H=self.param("sinks", partitioned(nn.initializers.zeros, ("heads",)), (c.heads,)) if c.sinks else None,
            rate=context.rates.get("attention", 0.0),
            key=self.make_rng("dropout") if "attention" in context.rates else None,
            backend=c.backend,
            strict=context.slots is None,
        )
        return output(out_BLHK, x_BLD.shape[-1], gain=self.gain, bias=c.biased_output, dtype=self.dtype)

    def _project(self, x_BLD: jax.Array, memory: Memory | None) -> tuple[jax.Array, ...]:
        """Queries, keys and values."""
        c, width = self.config, x_BLD.shape[-1]

        def linear(name: str, heads: int, axis: str) -> Linear:
            shape = (heads, c.size(width))
            return Linear((width,), shape, ("embed", axis, "head_dim"), bias=c.bias, dtype=self.dtype, name=name)

        query, key, value = (
            linear(name, heads, axis)
            for name, heads, axis in (
                ("query", c.heads, "heads"),
                ("key", c.groups, "kv_heads"),
                ("value", c.groups, "kv_heads"),
            )
        )
        if memory is None:
            q_BLHK, k_BMGK, v_BMGK = project(x_BLD, query, key, value)
        else:
            (q_BLHK,), (k_BMGK, v_BMGK) = project(x_BLD, query), project(memory.hidden, key, value)
        return (
            constrain(q_BLHK, "batch", "length", "heads_act", None),
            constrain(k_BMGK, "batch", "length", "kv_heads_act", None),
            constrain(v_BMGK, "batch", "length", "kv_heads_act", None),
        )


def score_bias(position: Position, context: Context, heads: int) -> Bias | None:
    """What the positional scheme adds to the scores; None for a scheme that adds nothing."""
    if not position.biases_scores:
        return None
    return Bias(partial(_bias, position, heads), dict(context.shared))


def _bias(position: Position, heads: int, shared: dict[str, jax.Array], queries_BL: jax.Array, keys_BM: jax.Array) -> jax.Array:
    bias_BHLM = position.bias(shared, queries_BL, keys_BM, heads)
    assert bias_BHLM is not None
    return bias_BHLM


def output(out_BLHK: jax.Array, width: int, *, gain: float, bias: bool, dtype: Any) -> jax.Array:
    """`[B, L, D]`: the heads' results through the projection that joins them, a submodule of the calling module."""
    out_BLHK = constrain(out_BLHK, "batch", "length", "heads_act", None)
    shape = out_BLHK.shape[2:]
    linear = Linear(shape, (width,), ("heads", "head_dim", "embed"), gain=gain, bias=bias, dtype=dtype, name="output")
    return linear(out_BLHK)
