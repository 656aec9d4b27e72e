"""A model's whole pass over padded rows: logits, the likelihood of what follows a context, and the last hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax.core.config import ConfigError
from llm_jax.infer.rows import Rows
from llm_jax.models.heads import SequenceClassifier, pool
from llm_jax.models.model import Model, Params
from llm_jax.models.stack import Stack
from llm_jax.nn.dispatch import Capacity
from llm_jax.nn.kernels import blocks
from llm_jax.nn.kernels.unembedding import Unembedding
from llm_jax.nn.losses import cross_entropy
from llm_jax.nn.moe import MoE
from llm_jax.nn.position import Learned, Rope
from llm_jax.nn.rope import DynamicScaling
from llm_jax.nn.routing import ExpertChoice
from llm_jax.nn.scores import rank

Pooling = Literal["first", "last", "mean"]


# ── what a model asks of its rows ────────────────────────────────────────────────────────────────────────────────────
def longest(stack: Stack) -> int | None:
    """The most tokens that a row may have; None: any number."""
    return stack.position.max_length if isinstance(stack.position, Learned) else None


def check_length(stack: Stack, tokens: int, what: str) -> None:
    """Raises `ConfigError` for a row that is longer than the table of positions."""
    most = longest(stack)
    if most is not None and tokens > most:
        raise ConfigError(f"takes {tokens} tokens, but the model has learned only {most} positions: shorten it", what)


def _rivalry(model: Model) -> set[str]:
    """Over what tokens compete for their experts' room, in any layer: "row", "batch"."""
    experts = [kind.ffn for stack in model.stacks.values() for kind in stack.in_full if isinstance(kind.ffn, MoE)]
    return {part.over for moe in experts for part in (moe.dispatch, moe.router) if isinstance(part, (Capacity, ExpertChoice))}


def alone(model: Model) -> bool:
    """Whether a row's result depends on the rows beside it, so that it is only its own where it is computed alone."""
    return "batch" in _rivalry(model)


def by_token(model: Model) -> bool:
    """Whether the head says something of each token, not of the row."""
    return not isinstance(model.head, SequenceClassifier)


def stretches(stack: Stack, length: float = math.inf) -> bool:
    """Whether rows of that length turn queries and keys otherwise than their beginnings alone would be."""
    ropes = [kind.position for kind in stack.in_full if isinstance(kind.position, Rope)]
    return any(isinstance(rope.scaling, DynamicScaling) and rope.scaling.original_length < length for rope in ropes)


def segments(rows: Rows) -> jax.Array:
    """`[B, L]`: 0, and -1 for padding."""
    return jnp.where(rows.real, 0, -1)


def index(stack: Stack, rows: Rows) -> jax.Array | None:
    """`[B, L]` places in the row, None for 0 … L-1. Padding counts only where the longest place stretches all angles."""
    return jnp.where(rows.real, jnp.arange(rows.tokens.shape[1])[None], -1) if stretches(stack) else None


# ── programs, one a model and shape ──────────────────────────────────────────────────────────────────────────────────
def apply(
    model: Model,
    vocabulary: int,
    params: Params,
    rows: Rows,
    inputs: Rows | None = None,
    *,
    types_BL: jax.Array | None = None,
    prefix_BL: jax.Array | None = None,
    **more: Any,
) -> Any:
    """What the network says of the rows; inputs: what an encoder reads. A causal model needs no mask for padding at the end."""
    network, variables = model.build(vocabulary), {"params": params}
    if model.encodes:
        assert inputs is not None
        given = {"input_segments_BM": segments(inputs), "index_BL": index(model.final, rows)}
        return network.apply(variables, inputs.tokens, rows.tokens, segments_BL=segments(rows), **given, **more)
    unseen = model.causal and by_token(model) and not _rivalry(model)
    given = {"index_BL": index(model.final, rows), "types_BL": types_BL, "prefix_BL": prefix_BL}
    return network.apply(variables, rows.tokens, None, None if unseen else segments(rows), **given, **more)


@partial(jax.jit, static_argnames=("model", "vocabulary"))
def logits(
    model: Model, vocabulary: int, params: Params, rows: Rows, inputs: Rows | None = None, types_BL: jax.Array | None = None
) -> jax.Array:
    """What the head says, float32: `[B, L, V]` of a language model, with zeros for padding."""
    said = apply(model, vocabulary, params, rows, inputs, types_BL=types_BL).astype(jnp.float32)
    if not by_token(model):
        return said
    return jnp.where(rows.real.reshape(*rows.real.shape, *[1] * (said.ndim - 2)), said, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """Of each row's scored tokens: Σ log p `[B]` float32, in nats, and whether each is the most probable one `[B]` bool."""

    log_p: jax.Array
    greedy: jax.Array


@partial(jax.jit, static_argnames=("model", "vocabulary"))
def score(
    model: Model,
    vocabulary: int,
    params: Params,
    rows: Rows,
    next_BL: jax.Array,
    first_B: jax.Array,
    inputs: Rows | None = None,
) -> Scored:
    """What `next_BL` is worth, the token after each of the rows' own; those that stand at place `first` >= 1 or later count.

    A `Prefix` mask shows what stands before `first`. Where logits are many they are made of a few tokens at a time.
    """
    places_1L = jnp.arange(rows.tokens.shape[1])[None]
    prefix_BL = places_1L < first_B[:, None] if model.prefix_mask else None
    said, sown = apply(model, vocabulary, params, rows, inputs, prefix_BL=prefix_BL, mutable=["unembedding"])
    unembedding, *_ = jax.tree.leaves(sown["unembedding"], is_leaf=lambda part: isinstance(part, Unembedding))
    at_once = blocks.at_once(unembedding)
    nll_BL, rank_BL = _judged({}, said, next_BL) if at_once else blocks.each(_judged, unembedding, next_BL, {})
    scored_BL = (places_1L + 1 >= first_B[:, None]) & rows.real
    return Scored(-jnp.where(scored_BL, nll_BL, 0).sum(-1), ((rank_BL == 0) | ~scored_BL).all(-1))


def _judged(_: Any, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(logits, targets)[0], rank(logits, targets)


@partial(jax.jit, static_argnames=("model", "vocabulary", "pooling"))
def embed(model: Model, vocabulary: int, params: Params, rows: Rows, *, pooling: Pooling) -> jax.Array:
    """`[B, D]` float32: the hidden states that the head would read (of an encoder-decoder: that the decoder would), pooled."""
    if model.encodes:
        network = model.build(vocabulary)
        hidden_BLD = network.apply({"params": params}, rows.tokens, segments_BM=segments(rows), method="encode").hidden
    else:
        _, sown = apply(model, vocabulary, params, rows, mutable=["intermediates"])
        hidden_BLD = sown["intermediates"]["hidden"][0]
    return pool(hidden_BLD.astype(jnp.float32), pooling, rows.real)
