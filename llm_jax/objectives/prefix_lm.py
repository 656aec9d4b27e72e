"""Prefix language modelling with a cut at random: the rest of each document, given its beginning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llm_jax.core.config import require
from llm_jax.core.types import Batch
from llm_jax.objectives.next_token import NextToken, check_blind
from llm_jax.objectives.rows import arranged, documents, position_in_segment, predicting


@dataclass(frozen=True)
class PrefixLM(NextToken):
    """Next-token prediction after a prefix of each document, which ends anywhere alike (Raffel et al. 2020, §3.1.4, table 3).

    An encoder-decoder reads the prefix in its encoder, and its decoder begins with the last of it; a decoder sees it from
    everywhere with the mask `Prefix()`, and causally without. `Continuation` cuts all rows at one place instead.
    """

    def check(self, model):
        require(model.head.words, "model.head", "must score token ids to continue a text: take LanguageModel()")
        check_blind(model)

    def lengths(self, length, *, model, packed):
        return (length - 1, length) if model.encodes else (length, 0)

    def pose(self, batch, keys_B, *, model, tokens):
        rows = Batch(batch.tokens, batch.targets, batch.weights, batch.segments)
        if model.encodes:
            return jax.vmap(_split)(keys_B, rows)
        prefix_BL, scored_BL = jax.vmap(_cut)(keys_B, rows)
        weights_BL = scored_BL.astype(jnp.float32)
        return replace(batch, prefix=prefix_BL, weights=weights_BL if batch.weights is None else batch.weights * weights_BL)


def _cut(key: jax.Array, row: Batch) -> tuple[jax.Array, jax.Array]:
    """`[L]`: what is given, and from where on the next token is asked for."""
    docs = documents(row)
    cut_D = jax.random.randint(key, docs.size_D.shape, 1, jnp.maximum(docs.size_D, 2))  # 1 … size - 1
    cut_L = cut_D[docs.number_L]
    return docs.place_L < cut_L, (docs.place_L >= cut_L - 1) & docs.live_D[docs.number_L]


def _split(key: jax.Array, row: Batch) -> Batch:
    """What is given as inputs; the decoder begins with the last of it."""
    docs, (given_L, asks_L) = documents(row), _cut(key, row)
    room = len(docs.number_L)
    values = {"ids": row.tokens, "segments": docs.number_L}
    shown, filled_M = arranged(docs.number_L, given_L & docs.live_D[docs.number_L], room, values)
    said, filled_R = arranged(docs.number_L, asks_L, room, values | {"scored": ~given_L})
    segments_M = jnp.where(filled_M, shown["segments"], -1)
    answer = predicting(said["ids"], filled_R, said["segments"], said["scored"])
    return replace(answer, inputs=shown["ids"], input_segments=segments_M, input_positions=position_in_segment(segments_M))
