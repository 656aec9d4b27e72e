"""Prefix language modelling: the second part of a row given the first, all of which may be seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from llm_jax.core.config import require
from llm_jax.core.types import Batch
from llm_jax.objectives.next_token import NextToken, check_blind


@dataclass(frozen=True)
class Continuation(NextToken):
    """Next-token prediction of what follows the first `fraction` of a row (Liu et al. 2018; Raffel et al. 2020, §3.2.1).

    An encoder-decoder reads the first part in its encoder; a decoder sees it from everywhere with the mask `Prefix()`, and
    causally without. All are scored on the same tokens.
    """

    fraction: float = 0.5

    def validate(self):
        super().validate()
        require(0 < self.fraction < 1, "fraction", f"must be in (0, 1), got {self.fraction}")

    def check(self, model):
        require(model.head.words, "model.head", "must score token ids to continue a text: take LanguageModel()")
        check_blind(model)

    def lengths(self, length, *, model, packed):
        cut = self._cut(length)
        return (length - cut + 1, cut) if model.encodes else (length, 0)

    def _cut(self, length: int) -> int:
        return min(max(round(self.fraction * length), 1), length - 1)

    def loss(self, apply, params, batch, *, model, rng, byte_lengths, train):
        cut = self._cut(batch.tokens.shape[1])
        given = _second_part(batch, cut) if model.encodes else _prefixed(batch, cut)
        return super().loss(apply, params, given, model=model, rng=rng, byte_lengths=byte_lengths, train=train)


def _prefixed(batch: Batch, cut: int) -> Batch:
    """The whole row, in which the first `cut` tokens are seen from everywhere and what they predict among them is not scored."""
    shape = batch.tokens.shape
    places_BL = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    scored_BL = (places_BL >= cut - 1).astype(jnp.float32)
    weights_BL = scored_BL if batch.weights is None else batch.weights * scored_BL
    return replace(batch, prefix=places_BL < cut, weights=weights_BL)


def _second_part(batch: Batch, cut: int) -> Batch:
    """The first `cut` tokens as inputs, and the rest, which begins with the last of them, for the decoder.

    Positions of what goes on in the rest are counted from there.
    """
    rest = {
        name: getattr(batch, name)[:, cut - 1 :]
        for name in ("tokens", "targets", "weights", "segments", "positions")
        if getattr(batch, name) is not None
    }
    if "positions" in rest:
        rest["positions"] = jnp.minimum(rest["positions"], jnp.arange(rest["positions"].shape[1])[None])
    segments_BM, positions_BM = (None if x is None else x[:, :cut] for x in (batch.segments, batch.positions))
    return Batch(**rest, inputs=batch.tokens[:, :cut], input_segments=segments_BM, input_positions=positions_BM)
