"""Attention maps: the softmax weights of every layer and head for a text, and numbers that sum a map up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch
from llm_jax.models.intervention import observed, unrolled
from llm_jax.models.model import Model, Params, unstack_layers
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Places, attend
from llm_jax.nn.context import Context
from llm_jax.nn.latent import MLA
from llm_jax.nn.multihead import Attention, score_bias
from llm_jax.nn.position import NoPosition, Position

Sown = Mapping[str, Any]


@dataclass(frozen=True)
class Map:
    """Who looks at whom in one layer. weights `[B, H, L, M]` float32: rows are queries, and sum to one less what a sink takes.

    stack: "" or an encoder-decoder's "encoder" or "decoder". kind: "cross" is a decoder's attention to the encoder's output.
    """

    stack: str
    layer: int
    kind: Literal["self", "cross"]
    weights: np.ndarray


class Numbers(NamedTuple):
    """Of each head, `[H]`, averaged over the queries that see anything.

    entropy: of the weights in bits, where a sink counts as one more key. distance: between a query and what it looks at, in places,
    NaN for cross-attention. first: the weight of the row's first key. sink: the weight that a learned sink takes.
    """

    entropy: np.ndarray
    distance: np.ndarray
    first: np.ndarray
    sink: np.ndarray


def attention_weights(q_BLHK: jax.Array, k_BMGK: jax.Array, **given: Any) -> jax.Array:
    """`[B, H, L, M]` float32: the weights that `attend` would give the values, whatever `given` it is told besides.

    They are its result for the unit vectors as values, by the kernel that writes scores out.
    """
    B, M, G, _ = k_BMGK.shape
    unit_BMGM = jnp.broadcast_to(jnp.eye(M, dtype=jnp.float32)[None, :, None], (B, M, G, M))
    return attend(q_BLHK, k_BMGK, unit_BMGM, backend="dense", **given).transpose(0, 2, 1, 3)


def attention_maps(model: Model, vocabulary: int, params: Params, batch: Batch) -> list[Map]:
    """The maps of all layers that have attention, in the order in which they are computed."""
    plain, alone = unrolled(model), unstack_layers(params, model)
    found = jax.jit(partial(_weights, plain, vocabulary))(alone, batch)
    keys = sorted(found, key=lambda key: (list(plain.stacks).index(key[0]), key[1], key[2] == "cross"))
    return [Map(*key, np.asarray(found[key])) for key in keys]


def head_numbers(found: Map) -> Numbers:
    """Entropy and mean distance of each head, and where it goes if nowhere in particular."""
    p_BHLM = found.weights.astype(np.float64)
    total_BHL = p_BHLM.sum(-1)
    seen_BHL = total_BHL > 1e-6
    rest_BHL = np.where(seen_BHL, np.clip(1 - total_BHL, 0, 1), 0)
    rest_BHL = np.where(rest_BHL < 1e-5, 0, rest_BHL)  # rounding is no sink
    L, M = p_BHLM.shape[2:]
    apart_LM = np.abs(np.arange(L)[:, None] - np.arange(M)[None])
    mean = lambda x_BHL: (x_BHL * seen_BHL).sum((0, 2)) / np.maximum(seen_BHL.sum((0, 2)), 1)  # noqa: E731
    distance_BHL = (p_BHLM * apart_LM[None, None]).sum(-1) / np.maximum(total_BHL, 1e-30)
    distance_H = mean(distance_BHL) if found.kind == "self" else np.full(p_BHLM.shape[1], np.nan)
    entropy_BHL = -_plogp(p_BHLM).sum(-1) - _plogp(rest_BHL)
    return Numbers(mean(entropy_BHL), distance_H, mean(p_BHLM[..., 0]), mean(rest_BHL))


def _plogp(p: np.ndarray) -> np.ndarray:
    return p * np.log2(np.where(p > 0, p, 1))


# ── what the layers were told ────────────────────────────────────────────────────────────────────────────────────────
def _weights(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[tuple[str, int, str], jax.Array]:
    sown = observed(model, vocabulary, params, batch)[1]
    config = model.build(vocabulary).config  # as parametrized
    found = {}
    for name, stack in config.stacks.items():
        own, left = (tree.get(name, {}) if name else tree for tree in (params, sown))
        where = _places(config, name, batch)
        context = Context(where, _shared(stack, own))
        for index, kind in enumerate(stack.in_full):
            layer = left[f"layers_{index}"]
            if "q_BLHK" in layer.get("attention", {}):
                sinks = own[f"layers_{index}"]["attention"].get("sinks")
                given = _told(kind.attention, kind.position, context) | {"queries": where, "keys": where, "sinks_H": sinks}
                found[name, index, "self"] = _of(layer["attention"], given)
            if "cross" in layer:
                given = _told(config.across, NoPosition(), context)
                given |= {"queries": where, "keys": _places(config, "encoder", batch)}
                given["sinks_H"] = own[f"layers_{index}"]["cross"].get("sinks")
                found[name, index, "cross"] = _of(layer["cross"], given)
    return found


def _of(sown: Sown, given: Mapping[str, Any]) -> jax.Array:
    return attention_weights(sown["q_BLHK"][0], sown["k_BMGK"][0], **given)


def _told(mixer: Attention | MLA, position: Position, context: Context) -> dict[str, Any]:
    """What such a layer asks `attend` for besides its sinks and where tokens stand."""
    bias = score_bias(position, context, mixer.heads)
    if isinstance(mixer, MLA):
        scale = mixer.scale or position.score_factor / np.sqrt(mixer.nope_dim + mixer.rope_dim)
        return {"mask": mixer.mask, "bias": bias, "scale": scale}
    return {"mask": mixer.mask, "bias": bias, "scale": mixer.scale, "soft_cap": mixer.soft_cap}


def _places(model: Model, stack: str, batch: Batch) -> Places:
    """Where the tokens of a stack stand."""
    if not model.encodes:
        return Places(None, batch.segments, batch.prefix, batch.positions)
    if stack == "encoder":
        return Places(segment=batch.input_segments, position=batch.input_positions)
    segments = batch.segments
    if segments is None and batch.input_segments is not None:  # as the model: one document a row
        segments = jnp.zeros(batch.tokens.shape, jnp.int32)
    return Places(segment=segments, position=batch.positions)


def _shared(stack: Stack, params: Params) -> dict[str, jax.Array]:
    """What the layers of a stack share for positions."""
    return stack.position.shared(stack.heads_for_bias, param=lambda name, *_: params["position"][name])
