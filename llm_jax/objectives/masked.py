"""Masked language modelling: hidden tokens are guessed from both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import require, traced
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import Special
from llm_jax.objectives.hidden import Hidden

MASK = Special(("[MASK]", "<mask>", "<|mask|>"))


@dataclass(frozen=True)
class MaskedLM(Hidden):
    """Each token is chosen with probability `rate`, and predicted at its own place (Devlin et al. 2019, §3.1).

    Of the chosen `masked` become the mask token, `random` any token of the vocabulary, and the rest stay as they are: 80, 10 and
    10%. What is chosen is drawn anew every time a row comes round (Liu et al. 2019, §4.1). The end of a document is never chosen.
    """

    rate: float = traced(0.15)
    masked: float = traced(0.8)
    random: float = traced(0.1)

    @property
    def specials(self):
        return (MASK,)

    def validate(self):
        super().validate()
        require(0 < self.rate < 1, "rate", f"must be in (0, 1), got {self.rate}")
        for name in ("masked", "random"):
            require(0 <= getattr(self, name) <= 1, name, f"must be in [0, 1], got {getattr(self, name)}")
        both = self.masked + self.random
        require(both <= 1, "random", f"must be at most 1 - masked = {1 - self.masked:g}, got {self.random}")
        require(self.after is None, "after", "is of what comes after a token, and masked tokens are seen from both sides: leave it")

    def check(self, model):
        require(model.head.words, "model.head", "must score token ids to guess those that are hidden: take LanguageModel()")
        require(not model.encodes, "objective", "has no input for an encoder: take SpanCorruption(), or an Encoder as the model")
        blind = "shows a token none that come later, and a hidden one is guessed from both sides: take Encoder()"
        require(not model.causal, "model.attention", blind)

    def pose(self, batch, keys_B, *, model, tokens):
        mask, end, vocabulary = tokens.specials[MASK.name], tokens.end, tokens.vocabulary
        others = jnp.asarray(np.setdiff1d(np.arange(vocabulary), list(tokens.specials.values())), jnp.int32)

        def hide(key: jax.Array, ids_L: jax.Array) -> tuple[jax.Array, jax.Array]:
            choose, become, draw = jax.random.split(key, 3)
            chosen_L = jax.random.uniform(choose, ids_L.shape) < self.rate
            if end is not None:
                chosen_L = chosen_L & (ids_L != end)
            fate_L = jax.random.uniform(become, ids_L.shape)
            drawn_L = others[jax.random.randint(draw, ids_L.shape, 0, len(others))]
            new_L = jnp.where(fate_L < self.masked, mask, jnp.where(fate_L < self.masked + self.random, drawn_L, ids_L))
            return jnp.where(chosen_L, new_L, ids_L), chosen_L

        hidden_BL, chosen_BL = jax.vmap(hide)(keys_B, batch.tokens)
        return replace(batch, tokens=hidden_BL, targets=batch.tokens, weights=chosen_BL * _counted(batch))


def _counted(batch: Batch) -> jax.Array:
    """`[B, L]`: 1 for the tokens themselves, which are targets here, but for padding and rows whose targets all count nothing."""
    counted_BL = jnp.ones(batch.tokens.shape, jnp.float32)
    if batch.weights is not None:
        counted_BL = counted_BL * (batch.weights > 0).any(1, keepdims=True)
    return counted_BL if batch.segments is None else counted_BL * (batch.segments >= 0)
