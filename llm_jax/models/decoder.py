"""The decoder-only Transformer: embeddings, a stack of blocks, and a head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.sharding import constrain
from llm_jax.models.combinations import check_embedding, check_head, check_stack
from llm_jax.models.heads import Head, LanguageModel
from llm_jax.models.model import Model
from llm_jax.models.mup import MuP
from llm_jax.models.stack import Stack, enter, layers
from llm_jax.nn.attention import Places
from llm_jax.nn.context import Context
from llm_jax.nn.dropout import dropout
from llm_jax.nn.embedding import Embed, Embedding


@dataclass(frozen=True)
class Decoder(Stack, Model):
    """One stack of layers over the embedded tokens, causal by default, with a head that predicts the next one."""

    embedding: Embed = field(default_factory=Embed)
    head: Head = field(default_factory=LanguageModel)
    mup: MuP | None = None

    def validate(self):
        super().validate()
        check_stack(self)
        check_embedding(self.embedding, self.width)
        check_head(self.head, self)
        if self.mup:
            self.mup.check(self)

    def build(self, vocabulary: int) -> Transformer:
        """The network over so many token ids."""
        return Transformer(self.mup.parametrized(self) if self.mup else self, vocabulary)

    def rates(self, vocabulary):
        return self.mup.rates(self, vocabulary) if self.mup else None

    def arguments(self, batch):
        return (batch.tokens, batch.positions, batch.segments), {"prefix_BL": batch.prefix}

    @property
    def stacks(self):
        return {"": self}


class Transformer(nn.Module):
    """`tokens [B, L] -> logits [B, L, V]` float32, or what another head makes of them."""

    config: Any
    vocabulary: int

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        *,
        prefix_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        index_BL: jax.Array | None = None,
        slots: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """positions: in the document, default the places in the row. segments: a number a document, and attention stays within
        it; a negative one is padding. prefix: the tokens that a `Prefix` mask shows to all. types: kinds of tokens (`Embed.types`).
        index: places in the row, default 0 … L-1; slots: length of the cache that holds what stood before (the collection "cache").
        deterministic: no dropout."""
        c = self.config
        rates = {} if deterministic else c.dropout.rates()
        places = Places(index_BL, segments_BL, prefix_BL, positions_BL)
        embedding = Embedding(c.embedding, self.vocabulary, c.width, c.precision.dtype, name="embedding")
        x_BLD, shared = enter(c, embedding(tokens_BL), places.in_document(tokens_BL.shape[1]), unit=c.embedding.deviation)
        x_BLD = embedding.finish(x_BLD, types_BL)
        if "embedding" in rates:
            x_BLD = dropout(x_BLD, rates["embedding"], self.make_rng("dropout"))
        x_BLD = constrain(x_BLD, "batch", "length", "embed_act")
        self.sow("intermediates", "stream", x_BLD)
        context = Context(places, shared, rates, slots=slots)
        x_BLD = layers(c, x_BLD, context)
        self.sow("intermediates", "hidden", x_BLD)
        return c.head.build(c, self.vocabulary)(x_BLD, embedding, tokens_BL, context)
