"""The decoder-only Transformer: embeddings, a stack of blocks, and a language-model head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive, substitute
from llm_jax.core.platform import traits
from llm_jax.core.sharding import constrain, unbox
from llm_jax.models.block import Block
from llm_jax.nn.dropout import Dropout, dropout
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.ffn import Dense, FeedForward
from llm_jax.nn.kernels.product import product
from llm_jax.nn.linear import Linear, Precision
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, Norm, Normalize, Placement
from llm_jax.nn.position import Position, Positions, Rope
from llm_jax.nn.residual import Residual

EMBEDDING_DEVIATION = 0.02  # Radford et al. 2019

# what the backward pass keeps of a block instead of computing it again; "none" keeps all
REMAT = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclass(frozen=True)
class Decoder(Config):
    """A decoder-only Transformer of `depth` layers and `width` channels.

    tied: the output layer is the embedding table. embedding_scale: embeddings enter multiplied by √width, with entries of
    deviation 1, as the branches that are added to them have (Vaswani et al. 2017, §3.4); without it they enter at 0.02 (Radford
    et al. 2019), and the first branches drown them.
    layers: "scanned" compiles one layer body and stacks the layers' parameters, "unrolled" compiles each; "auto" asks the
    platform. remat: what the backward pass recomputes.
    """

    width: int = 128
    depth: int = 4
    attention: Attention = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=Dense)
    position: Position = field(default_factory=Rope)
    norm: Norm = field(default_factory=LayerNorm)
    placement: Placement = "pre"
    residual: Residual = field(default_factory=Residual)
    dropout: Dropout = field(default_factory=Dropout)
    tied: bool = True
    embedding_scale: bool = True
    layers: Literal["auto", "unrolled", "scanned"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"
    precision: Precision = field(default_factory=Precision)

    def validate(self):
        require_positive(self, "width", "depth")
        whole = self.attention.head_dim is not None or self.width % self.attention.heads == 0
        require(
            whole,
            "attention.heads",
            f"must divide width={self.width} unless attention.head_dim is given, got {self.attention.heads}",
        )
        if isinstance(self.position, Rope):
            size = self.attention.size(self.width)
            require(
                int(size * self.position.fraction) >= 2,
                "position",
                f"turns pairs of channels, but a head has only {size}: use fewer heads or a larger fraction",
            )

    @property
    def scanned(self) -> bool:
        """Whether the layers are one scanned body: the platform likes it, or they are recomputed, which XLA:CPU undoes unrolled."""
        return traits().scan_layers or self.remat != "none" if self.layers == "auto" else self.layers == "scanned"

    def build(self, vocabulary: int) -> Transformer:
        """The network over so many token ids."""
        return Transformer(self, vocabulary)


class Transformer(nn.Module):
    """`tokens [B, L] -> logits [B, L, V]` float32."""

    config: Decoder
    vocabulary: int

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """positions: default 0 … L-1; segments: a number a document, and attention stays within it; deterministic: no dropout."""
        c = self.config
        rates = {} if deterministic else c.dropout.rates()
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
        unit = 1.0 if c.embedding_scale else EMBEDDING_DEVIATION
        embedding = Embedding(self.vocabulary, c.width, unit, c.embedding_scale, c.precision.dtype, name="embedding")
        x_BLD, shared = Positions(c.position, name="position")(
            embedding(tokens_BL), positions_BL, unit=unit, heads=c.attention.heads
        )
        if "embedding" in rates:
            x_BLD = dropout(x_BLD, rates["embedding"], self.make_rng("dropout"))
        x_BLD = constrain(x_BLD, "batch", "length", "embed_act")
        x_BLD = self._layers(x_BLD, segments_BL, shared, rates)
        if c.placement != "post":
            x_BLD = Normalize(c.norm, name="final_norm")(x_BLD)
        if c.tied:
            logits_BLV = embedding.logits(x_BLD)
        else:
            head = Linear((c.width,), (self.vocabulary,), ("embed", "vocab"), dtype=c.precision.dtype, name="head")
            logits_BLV = product(x_BLD.astype(head.dtype), head.weights()[0], result=jnp.float32)
        return constrain(logits_BLV, "batch", "length", "vocab_act")

    def _layers(self, x_BLD: jax.Array, *given: Any) -> jax.Array:
        c: Decoder = self.config
        # rates reach the layers as arguments: a module's fields must not hold tracers where Linen lifts it
        config = substitute(c, {"dropout": Dropout()})
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=not c.scanned, policy=REMAT[c.remat])
        if not c.scanned:
            for index in range(c.depth):
                x_BLD, _ = block(config, name=f"layers_{index}")(x_BLD, *given)
            return x_BLD
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config, name="layers")(x_BLD, *given)[0]


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────────
Params = Mapping[str, Any]


def abstract_parameters(config: Decoder, vocabulary: int) -> Params:
    """Shapes and dtypes of the parameters, boxed with their logical axes."""
    return jax.eval_shape(partial(_boxed, config, vocabulary), jax.random.key(0))


def initial_parameters(config: Decoder, vocabulary: int, key: jax.Array) -> Params:
    """Fresh parameters: the same numbers whether layers are scanned or unrolled, and a program that does not grow with depth."""
    stacked = unbox(_boxed(substitute(config, {"layers": "scanned"}), vocabulary, key))
    return stacked if config.scanned else unstack_layers(stacked)


def _boxed(config: Decoder, vocabulary: int, key: jax.Array) -> Params:
    return config.build(vocabulary).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def stack_layers(params: Params) -> dict[str, Any]:
    """Unrolled parameters (`layers_0`, …) as scanned ones (`layers`, with a leading layer axis on every leaf)."""
    names = sorted((k for k in params if re.fullmatch(r"layers_\d+", k)), key=lambda k: int(k.split("_")[1]))
    rest = {k: v for k, v in params.items() if k not in names}
    return rest | ({"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[k] for k in names))} if names else {})


def unstack_layers(params: Params) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(depth)}


def parameter_roles(params: Any) -> Any:
    """For every leaf what it is to an optimizer: "matrix", "embedding", "head" or "vector"."""

    def role(path, leaf) -> str:
        names = [k.key for k in path]
        if names[-1] == "embedding":
            return "embedding"
        if names[-1] != "kernel":
            return "vector"
        return "head" if names[0] == "head" else "matrix"

    return jax.tree_util.tree_map_with_path(role, params)


def matrix_axes(params: Any) -> Any:
    """For every leaf its (input axes, output axes) as a linear map, counted from 0; `None` for vectors and tables.

    Axes in neither, such as the layer axis of scanned parameters, count separate matrices.
    """

    def axes(path, leaf):
        names = [k.key for k in path]
        if names[-1] != "kernel":
            return None
        first = 1 if names[0] == "layers" else 0
        inputs = 2 if names[-2] == "output" else 1
        return tuple(range(first, first + inputs)), tuple(range(first + inputs, leaf.ndim))

    return jax.tree_util.tree_map_with_path(axes, params)
