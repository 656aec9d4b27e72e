"""What is read off the last layer: the next token, several tokens ahead, a class of the sequence or of each token, a number."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive
from llm_jax.core.sharding import constrain, partitioned
from llm_jax.models.block import Block, Layer, layer_entries, layer_parameters
from llm_jax.nn.activations import ACTIVATIONS, Activation
from llm_jax.nn.context import Context
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.kernels.unembedding import Unembedding
from llm_jax.nn.linear import Linear, project
from llm_jax.nn.normalization import Normalize

if TYPE_CHECKING:
    from llm_jax.models.stack import Stack


@dataclass(frozen=True)
class Head(Config):
    """What a model says of each token or of the sequence. gain: its last matrix is drawn with deviation gain / √width."""

    abstract = True
    tied = False
    words = False  # whether it scores token ids

    gain: float = field(default=1.0, kw_only=True)

    def validate(self):
        require(self.gain >= 0, "gain", f"must be >= 0, got {self.gain}")

    def build(self, stack: Stack, vocabulary: int, name: str | None = "head") -> nn.Module:
        """The module `(x [B, L, D], embedding, tokens [B, L], Context) -> output`."""
        raise NotImplementedError

    def parameters(self, stack: Stack, vocabulary: int) -> int:
        """Trainable scalars, without a tied table."""
        raise NotImplementedError

    def entries(self, stack: Stack, vocabulary: int) -> int:
        """Entries of matrices that multiply every token, without a tied table."""
        raise NotImplementedError

    def layers(self, stack: Stack) -> dict[tuple[str, ...], Layer]:
        """Layers of its own, in full, and where in its parameters each lies."""
        return {}


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class LanguageModel(Head):
    """A score for every token id, `[B, L, V]` float32.

    tied: the matrix is the embedding table (Press & Wolf 2017). multiplier: of the logits. soft_cap c: logits become
    c·tanh(logit / c) (Gemma 2). transform: a square matrix with bias, this activation and a norm come first (BERT).
    """

    words = True

    tied: bool = True
    bias: bool = False
    soft_cap: float | None = None
    multiplier: float = 1.0
    transform: Activation | None = None

    def validate(self):
        super().validate()
        require_positive(self, "soft_cap", "multiplier")
        require(not self.tied or self.gain == 1, "gain", "is of a matrix of the head's own: set tied=false, or leave it")

    def build(self, stack, vocabulary, name="head"):
        return Words(self, stack, vocabulary, name=name)

    def parameters(self, stack, vocabulary):
        bias = vocabulary * self.bias
        transform = stack.width * (1 + len(stack.norm.vectors())) if self.transform else 0
        return LanguageModel.entries(self, stack, vocabulary) + bias + transform

    def entries(self, stack, vocabulary):
        return (0 if self.tied else stack.width * vocabulary) + (stack.width**2 if self.transform else 0)


class Words(nn.Module):
    """`[B, L, D] -> [B, L, V]` float32.

    What logits are made of is left in Linen's collection "unembedding", one `Unembedding` a call: logits that nobody uses are not
    computed by a compiled program.
    """

    config: LanguageModel
    stack: Any
    vocabulary: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array, embedding: Embedding, tokens_BL: jax.Array, context: Context) -> jax.Array:
        c, width, dtype = self.config, self.stack.width, self.stack.precision.dtype
        if c.transform:
            square = Linear((width,), (width,), ("embed", "embed_out"), bias=True, dtype=dtype, name="transform")
            x_BLD = Normalize(self.stack.norm, name="transform_norm")(ACTIVATIONS[c.transform](square(x_BLD)))
        if c.tied:
            unembedding = embedding.unembedding(x_BLD)
        else:
            kernel = Linear((width,), (self.vocabulary,), ("embed", "vocab"), c.gain, dtype=dtype, name="words")
            unembedding = Unembedding(x_BLD.astype(dtype), kernel.weights()[0])
        bias_V = None
        if c.bias:
            bias_V = self.param("bias", partitioned(nn.initializers.zeros, ("vocab",)), (self.vocabulary,), jnp.float32)
        unembedding = replace(unembedding, bias=bias_V, multiplier=c.multiplier, soft_cap=c.soft_cap)
        if not self.is_initializing():
            self.sow("unembedding", "parts", unembedding)
        return constrain(unembedding.logits(), "batch", "length", "vocab_act")


@dataclass(frozen=True)
class MultiToken(LanguageModel):
    """Also predicts the `ahead` tokens after the next one, each by one more layer of the model's kind (DeepSeek-V3 2024, §2.2).

    Layer k sees [norm(h_i), norm(embedding of token i+k)] through a matrix `[2D, D]`, where h_i is what the layer before it made of
    place i, and all share the embedding and the output matrix. The logits of the next token are returned; those of token
    i + k + 1 are left in Linen's collection "ahead" as "logits_k", and are computed only where it is asked for. Places whose
    token i+k lies behind the row's end take the row's last token, and count nowhere.
    """

    ahead: int = 1

    def validate(self):
        super().validate()
        require_positive(self, "ahead")

    def build(self, stack, vocabulary, name="head"):
        return WordsAhead(self, stack, vocabulary, name=name)

    def parameters(self, stack, vocabulary):
        norms = 3 * stack.width * len(stack.norm.vectors())
        layer = layer_parameters(stack, stack.in_full[-1]) + 2 * stack.width**2 + norms
        return super().parameters(stack, vocabulary) + self.ahead * layer

    def entries(self, stack, vocabulary):
        once = super().entries(stack, vocabulary)
        words = once + (stack.width * vocabulary if self.tied else 0)
        return once + self.ahead * (layer_entries(stack, stack.in_full[-1]) + 2 * stack.width**2 + words)

    def layers(self, stack):
        return {(f"ahead_{step}", "block"): stack.in_full[-1] for step in range(1, self.ahead + 1)}


class WordsAhead(nn.Module):
    """`[B, L, D] -> [B, L, V]` float32, and the tokens ahead in the collection "ahead"."""

    config: MultiToken
    stack: Any
    vocabulary: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array, embedding: Embedding, tokens_BL: jax.Array, context: Context) -> jax.Array:
        words = Words(self.config, self.stack, self.vocabulary, name="next")
        logits_BLV = words(x_BLD, embedding, tokens_BL, context)
        if not (self.is_mutable_collection("ahead") or self.is_initializing()):
            return logits_BLV
        h_BLD = x_BLD
        for step in range(1, self.config.ahead + 1):
            later_BL = jnp.concatenate([tokens_BL[:, step:], jnp.repeat(tokens_BL[:, -1:], step, 1)], 1)[:, : tokens_BL.shape[1]]
            h_BLD = Ahead(self.stack, name=f"ahead_{step}")(h_BLD, embedding(later_BL), context)
            final_BLD = Normalize(self.stack.norm, name=f"ahead_{step}_norm")(h_BLD)
            self.sow("ahead", f"logits_{step}", words(final_BLD, embedding, tokens_BL, context), reduce_fn=lambda _, x: x)
        return logits_BLV


class Ahead(nn.Module):
    """`[B, L, D]` twice to once: a place's state and a later token's embedding, joined and through one block."""

    stack: Any

    @nn.compact
    def __call__(self, h_BLD: jax.Array, token_BLD: jax.Array, context: Context) -> jax.Array:
        c, width = self.stack, self.stack.width
        pair = [Normalize(c.norm, name="norm_state")(h_BLD), Normalize(c.norm, name="norm_token")(token_BLD)]
        join = Linear((2 * width,), (width,), ("embed", "embed_out"), dtype=c.precision.dtype, name="join")
        x = c.residual.open(join(jnp.concatenate(pair, -1)))
        return c.residual.close(Block(c, c.in_full[-1], name="block")(x, jnp.int32(c.depth), context))


# ── classes and numbers ──────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class TokenClassifier(Head):
    """A score for every label of every token, `[B, L, labels]` float32."""

    labels: int = 2
    bias: bool = True

    def validate(self):
        super().validate()
        require_positive(self, "labels")

    def build(self, stack, vocabulary, name="head"):
        return Labels(self, stack, name=name)

    def parameters(self, stack, vocabulary):
        return (stack.width + self.bias) * self.labels

    def entries(self, stack, vocabulary):
        return stack.width * self.labels


@dataclass(frozen=True)
class SequenceClassifier(TokenClassifier):
    """A score for every label of the row, `[B, labels]` float32, from its first token, its last, or the mean over all.

    transform: a square matrix with bias and this activation come first (BERT's pooler). Padding (a negative segment) is no token.
    """

    pooling: Literal["first", "last", "mean"] = "last"
    transform: Activation | None = None

    def parameters(self, stack, vocabulary):
        return super().parameters(stack, vocabulary) + (stack.width * (stack.width + 1) if self.transform else 0)

    def entries(self, stack, vocabulary):
        return super().entries(stack, vocabulary) + (stack.width**2 if self.transform else 0)


class Labels(nn.Module):
    """`[B, L, D] -> [B, L, labels]` or, pooled, `[B, labels]`."""

    config: TokenClassifier
    stack: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, embedding: Embedding, tokens_BL: jax.Array, context: Context) -> jax.Array:
        c, width, dtype = self.config, self.stack.width, self.stack.precision.dtype
        x = x_BLD
        if isinstance(c, SequenceClassifier):
            x = pool(x_BLD, c.pooling, context.valid)
            if c.transform:
                square = Linear((width,), (width,), ("embed", "embed_out"), bias=True, dtype=dtype, name="transform")
                x = ACTIVATIONS[c.transform](square(x))
        labels = Linear((width,), (c.labels,), ("embed", None), c.gain, bias=c.bias, dtype=dtype, name="labels")
        return project(x, labels)[0].astype(jnp.promote_types(dtype, jnp.float32))


def pool(x_BLD: jax.Array, how: Literal["first", "last", "mean"], valid_BL: jax.Array | None) -> jax.Array:
    """`[B, D]`: the first token's vector, the last's, or the mean of all that are no padding."""
    if valid_BL is None:
        return x_BLD.mean(1) if how == "mean" else x_BLD[:, 0 if how == "first" else -1]
    if how != "mean":
        last_B = jnp.where(valid_BL, jnp.arange(x_BLD.shape[1])[None], 0).max(-1)
        place_B = valid_BL.argmax(-1) if how == "first" else last_B
        return jnp.take_along_axis(x_BLD, place_B[:, None, None], 1)[:, 0]
    weights_BL1 = valid_BL[..., None].astype(x_BLD.dtype)
    return (x_BLD * weights_BL1).sum(1) / jnp.maximum(weights_BL1.sum(1), 1)


@dataclass(frozen=True)
class Scalar(Head):
    """A number for every token, `[B, L]` float32: a value, or, at a row's last token, a reward."""

    bias: bool = False

    def build(self, stack, vocabulary, name="head"):
        return Number(self, stack, name=name)

    def parameters(self, stack, vocabulary):
        return stack.width + self.bias

    def entries(self, stack, vocabulary):
        return stack.width


class Number(nn.Module):
    """`[B, L, D] -> [B, L]`."""

    config: Scalar
    stack: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, embedding: Embedding, tokens_BL: jax.Array, context: Context) -> jax.Array:
        c, dtype = self.config, jnp.promote_types(self.stack.precision.dtype, jnp.float32)
        linear = Linear((x_BLD.shape[-1],), (1,), ("embed", None), c.gain, bias=c.bias, dtype=dtype, name="number")
        return linear(x_BLD)[..., 0]
