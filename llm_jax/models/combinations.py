"""Which components make no sense together: what would do nothing, or be silently ignored, is refused with a sentence.

What one component rules out by itself is its own `validate`'s; what an objective needs of a model is the objective's `check`.
"""

from __future__ import annotations

from llm_jax.core.config import require
from llm_jax.models.block import Layer
from llm_jax.models.heads import Head, MultiToken
from llm_jax.models.stack import Stack
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import NoFeedForward
from llm_jax.nn.mixer import Mixer, NoMixing
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import T5Bias


def check_stack(stack: Stack, cross: Attention | None = None) -> None:
    """Raises `ConfigError` where a layer does nothing, or a position or a dropout rate has nothing to work on.

    cross: attention to an encoder's output in every layer.
    """
    for where, layer in stack.described.items():
        _check_layer(stack, where, layer, cross)
    _check_position(stack)
    _check_dropout(stack, cross)


def check_embedding(embedding: Embed, width: int) -> None:
    """Raises `ConfigError` where the factored table is larger than the whole one."""
    rank = embedding.rank or width
    require(rank <= width, "embedding.rank", f"must be at most width={width}, got {rank}: take a smaller one, or None")


def check_head(head: Head, stack: Stack) -> None:
    """Raises `ConfigError` where the head is to predict what the stack that it reads from has seen."""
    sentence = f"predicts later tokens, and {stack.sees_later} shows them: take LanguageModel(), or a model that is causal"
    require(stack.causal or not isinstance(head, MultiToken), "head", sentence)


def check_without_prefix(stack: Stack) -> None:
    """Raises `ConfigError` where a mask shows a prefix that is never given: an encoder reads it instead."""
    sentence = "is Prefix(), and an encoder-decoder's prefix is what its encoder reads: take Causal() or Bidirectional()"
    require(not stack.prefix_mask, stack.prefix_mask, sentence)


def _check_layer(stack: Stack, where: str, layer: Layer, cross: Attention | None) -> None:
    whole, own = stack.resolved(layer), layer.position
    idle = isinstance(whole.attention, NoMixing) and isinstance(whole.ffn, NoFeedForward) and cross is None
    sentence = "is NoFeedForward() in a layer of NoMixing(), which then does nothing: give it a network, or a mixer"
    require(not idle, f"{where}ffn", sentence)
    if own is None:
        return
    field, name = f"{where}position", f"{type(own).__name__}()"
    usable = _attends(whole.attention) or not own.inside_attention
    require(usable, field, f"is {name}, which works inside attention, and this layer has none: take NoPosition()")
    if own != stack.position:
        once = not own.added_to_embeddings
        require(once, field, f"is {name}, which is added to the embeddings, before any layer: make it the position of the stack")
        alone = not own.shared_by_layers
        require(alone, field, f"is {name}, whose parameters all layers share: make it the position of the stack")


def _check_position(stack: Stack) -> None:
    """The stack's own position must reach a layer, and fit those that take it."""
    position, takers = stack.position, stack.position_takers
    name = f"{type(position).__name__}()"
    attends = any(_attends(layer.attention) for layer in stack.in_full)
    sentence = f"is {name}, which works inside attention, and no layer attends: take NoPosition(), Sinusoidal() or Learned()"
    require(attends or position.added_to_embeddings or not position.inside_attention, "position", sentence)
    sentence = f"is {name}, whose parameters no layer uses, since all have positions of their own: take NoPosition()"
    require(bool(takers) or not position.shared_by_layers, "position", sentence)
    heads = sorted({mixer.heads_for_bias for mixer in takers})
    sentence = f"is {name}, one bias for all layers, whose attention must then have equally many heads, got {heads}"
    require(len(heads) < 2 or not position.shared_by_layers, "position", sentence)
    blind = isinstance(position, T5Bias) and not position.bidirectional and not all(mixer.causal for mixer in takers)
    sentence = "is T5Bias(), which cannot tell later tokens apart, and layers see them: take T5Bias(bidirectional=True)"
    require(not blind, "position", sentence)


def _check_dropout(stack: Stack, cross: Attention | None) -> None:
    rates, layers = stack.dropout.rates(), stack.in_full
    attends = cross is not None or any(_attends(layer.attention) for layer in layers)
    sentence = f"drops attention weights, and no layer attends: set it to 0, got {rates.get('attention')}"
    require(attends or "attention" not in rates, "dropout.attention", sentence)
    hidden = any(layer.ffn and layer.ffn.hidden(stack.width) for layer in layers)
    sentence = f"drops hidden units, and no layer has a feed-forward network: set it to 0, got {rates.get('ffn')}"
    require(hidden or "ffn" not in rates, "dropout.ffn", sentence)


def _attends(mixer: Mixer | None) -> bool:
    return mixer is not None and mixer.attends
