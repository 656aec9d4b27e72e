"""The encoder-decoder Transformer (Vaswani et al. 2017): two stacks of the same blocks; the second also looks at the first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import ConfigError, require
from llm_jax.core.sharding import constrain
from llm_jax.models.combinations import check_embedding, check_head, check_stack, check_without_prefix
from llm_jax.models.heads import Head, LanguageModel
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack, enter, layers
from llm_jax.nn.attention import Bidirectional, Places
from llm_jax.nn.context import Context, Memory
from llm_jax.nn.dropout import dropout
from llm_jax.nn.embedding import Embed, Embedding
from llm_jax.nn.multihead import Attention


@dataclass(frozen=True)
class EncoderDecoder(Model):
    """An encoder of the input and a decoder of the output.

    cross: attention from the decoder to the encoder's output; None is like the decoder's own, unmasked. shared_embedding: both
    stacks use one table.
    """

    encoder: Stack = field(default_factory=lambda: Stack(attention=Attention(mask=Bidirectional())))
    decoder: Stack = field(default_factory=Stack)
    cross: Attention | None = None
    embedding: Embed = field(default_factory=Embed)
    head: Head = field(default_factory=LanguageModel)
    shared_embedding: bool = True

    def validate(self):
        same = self.encoder.width == self.decoder.width
        require(same, "encoder.width", f"must be decoder.width={self.decoder.width}, got {self.encoder.width}")
        plain = self.decoder.placement in ("pre", "post", "sandwich")
        require(plain, "decoder.placement", "cannot be parallel with cross-attention: choose 'pre', 'post' or 'sandwich'")
        known = self.cross is not None or isinstance(self.decoder.attention, Attention)
        require(known, "cross", f"must be given where the decoder mixes by {type(self.decoder.attention).__name__}")
        free = self.across.mask == Bidirectional()
        require(free, "cross.mask", f"must be Bidirectional(): the encoder's places are not the decoder's, got {self.across.mask}")
        heads, split = self.across.heads, self.across.head_dim is not None or self.width % self.across.heads == 0
        require(split, "cross.heads", f"must divide width={self.width} unless cross.head_dim is given, got {heads}")
        for name, stack in self.stacks.items():
            try:
                check_stack(stack, self.across if stack is self.decoder else None)
                check_without_prefix(stack)
            except ConfigError as error:
                raise error.inside(name) from None
        check_embedding(self.embedding, self.width)
        check_head(self.head, self.decoder)

    @property
    def across(self) -> Attention:
        """Attention from the decoder to the encoder's output."""
        if self.cross is not None:
            return self.cross
        assert isinstance(self.decoder.attention, Attention)
        return replace(self.decoder.attention, mask=Bidirectional(), sinks=False)

    def arguments(self, batch):
        inputs = {"input_positions_BM": batch.input_positions, "input_segments_BM": batch.input_segments}
        return (batch.inputs, batch.tokens), inputs | {"positions_BL": batch.positions, "segments_BL": batch.segments}

    @property
    def tables(self):
        return 1 if self.shared_embedding else 2

    @property
    def stacks(self):
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def width(self) -> int:
        """Channels of both stacks."""
        return self.decoder.width

    @property
    def precision(self):
        """The decoder's."""
        return self.decoder.precision

    @property
    def dropout(self):
        """The decoder's."""
        return self.decoder.dropout

    def example(self):
        return jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)

    def build(self, vocabulary: int) -> SequenceToSequence:
        return SequenceToSequence(self, vocabulary)


class SequenceToSequence(nn.Module):
    """`(inputs [B, M], targets so far [B, L]) -> logits [B, L, V]` float32."""

    config: EncoderDecoder
    vocabulary: int

    def setup(self):
        c = self.config
        table = lambda: Embedding(c.embedding, self.vocabulary, c.width, c.precision.dtype)  # noqa: E731
        self.embedding = table()
        self.input_embedding = self.embedding if c.shared_embedding else table()
        self.encoder, self.decoder = Tower(c.encoder, c.embedding), Tower(c.decoder, c.embedding, c.across)
        self.head = c.head.build(c.decoder, self.vocabulary, name=None)

    def __call__(
        self,
        inputs_BM: jax.Array,
        targets_BL: jax.Array,
        *,
        input_positions_BM: jax.Array | None = None,
        input_segments_BM: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        index_BL: jax.Array | None = None,
        slots: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """targets: the decoder's input, each row beginning with a start token. Positions, segments, index and slots as a
        `Transformer`'s: a target sees the inputs of its own segment."""
        read = {"positions_BM": input_positions_BM, "segments_BM": input_segments_BM}
        memory = self.encode(inputs_BM, **read, deterministic=deterministic)
        given = {"positions_BL": positions_BL, "segments_BL": segments_BL, "index_BL": index_BL, "slots": slots}
        return self.decode(memory, targets_BL, **given, deterministic=deterministic)

    def encode(
        self,
        inputs_BM: jax.Array,
        *,
        positions_BM: jax.Array | None = None,
        segments_BM: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Memory:
        """What the decoder looks at."""
        places = Places(segment=segments_BM, position=positions_BM)
        rates = {} if deterministic else self.config.encoder.dropout.rates()
        return Memory(self.encoder(self.input_embedding, inputs_BM, Context(places, rates=rates)), places)

    def decode(
        self,
        memory: Memory,
        targets_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        index_BL: jax.Array | None = None,
        slots: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """`[B, L, V]` float32: the decoder's logits."""
        if segments_BL is None and memory.places.segment is not None:  # one document a row: its inputs are of segment 0
            segments_BL = jnp.zeros(targets_BL.shape, jnp.int32)
        rates = {} if deterministic else self.config.decoder.dropout.rates()
        places = Places(index_BL, segments_BL, position=positions_BL)
        context = Context(places, rates=rates, memory=memory, slots=slots)
        x_BLD = self.decoder(self.embedding, targets_BL, context)
        return self.head(x_BLD, self.embedding, targets_BL, context)


class Tower(nn.Module):
    """One of the two stacks, from token ids to what its last layer says, `[B, L, D]`."""

    config: Stack
    embed: Embed
    cross: Attention | None = None

    @nn.compact
    def __call__(self, embedding: Embedding, tokens_BL: jax.Array, context: Context) -> jax.Array:
        c = self.config
        x_BLD, shared = enter(c, embedding(tokens_BL), context.places.in_document(tokens_BL.shape[1]), unit=self.embed.deviation)
        x_BLD = embedding.finish(x_BLD, None)
        if "embedding" in context.rates:
            x_BLD = dropout(x_BLD, context.rates["embedding"], self.make_rng("dropout"))
        x_BLD = constrain(x_BLD, "batch", "length", "embed_act")
        self.sow("intermediates", "stream", x_BLD)
        return layers(c, x_BLD, replace(context, shared=shared), cross=self.cross)
