"""One Transformer layer: what mixes tokens, what transforms each, each normalized and joined to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.config import Config
from llm_jax.core.sharding import constrain
from llm_jax.nn.context import Context
from llm_jax.nn.dropout import dropout
from llm_jax.nn.ffn import FeedForward, NoFeedForward
from llm_jax.nn.mixer import Mixer, NoMixing
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import Normalize
from llm_jax.nn.position import NoPosition, Position
from llm_jax.nn.residual import Connection


@dataclass(frozen=True)
class Layer(Config):
    """What some layers do differently from the rest of their stack; None: nothing.

    position: how it turns queries and keys and biases scores, by its own numbers; what layers share is the stack's.
    """

    attention: Mixer | None = None
    ffn: FeedForward | None = None
    position: Position | None = None


Branch = Callable[[jax.Array], jax.Array]


class Block(nn.Module):
    """`(stream, index of the layer, Context) -> stream`; a stream is `[B, L, D]`, or `[B, L, n, D]` of n copies.

    config: the stack's; layer: what this one does differently; cross: attention to the memory between the two branches.
    """

    config: Any
    layer: Layer = Layer()
    cross: Attention | None = None

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array, context: Context) -> jax.Array:
        branches = self._branches(context)
        if self.config.placement in ("parallel", "parallel_shared"):
            branches = [("attention", lambda h: self._together(h, branches_of))] if (branches_of := branches) else []
        for number, (name, branch) in enumerate(branches):
            x = self._join(name, x, branch, place=len(branches) * index + number, context=context)
        self.sow("intermediates", "stream", x)
        return x

    def _branches(self, context: Context) -> list[tuple[str, Branch]]:
        """Name and function of each branch that this layer has."""
        c, layer = self.config, self.layer
        gain, dtype = c.residual.shrinkage(c.depth), c.precision.dtype
        mixer, ffn, branches = layer.attention or c.attention, layer.ffn or c.ffn, []
        if not isinstance(mixer, NoMixing):
            mix = mixer.build(layer.position or c.position, gain, dtype, "attention")
            branches.append(("attention", lambda h: mix(h, context)))
        if self.cross:
            across = self.cross.build(NoPosition(), gain, dtype, "cross")
            branches.append(("cross", lambda h: across(h, context, context.memory)))
        if not isinstance(ffn, NoFeedForward):
            network = ffn.build(gain, dtype, "ffn")
            branches.append(("ffn", lambda h: network(h, context.rates, context.valid)))
        return branches

    def _together(self, h_BLD: jax.Array, branches: list[tuple[str, Branch]]) -> jax.Array:
        """All branches side by side (Wang & Komatsuzaki 2021, GPT-J), each with a norm of its own or all with the same."""
        shared = self._norm("norm_attention", h_BLD) if self.config.placement == "parallel_shared" else None
        outputs = [branch(self._norm(f"norm_{name}", h_BLD) if shared is None else shared) for name, branch in branches]
        return sum(outputs[1:], outputs[0])

    def _join(self, name: str, x: jax.Array, branch: Branch, *, place: jax.Array, context: Context) -> jax.Array:
        c, rates = self.config, context.rates
        h_BLD, write = Connection(c.residual, c.depth, name=f"residual_{name}")(x, place)
        h_BLD = branch(self._norm(f"norm_{name}", h_BLD) if c.placement in ("pre", "sandwich") else h_BLD)
        if "residual" in rates:
            h_BLD = dropout(h_BLD, rates["residual"], self.make_rng("dropout"))
        if c.placement == "sandwich":
            h_BLD = self._norm(f"norm_after_{name}", h_BLD)
        if "layer" in rates:
            h_BLD = dropout(h_BLD, rates["layer"], self.make_rng("dropout"), whole=2)
        x = write(h_BLD)
        if c.placement == "post":
            x = self._norm(f"norm_{name}", x)
        return constrain(x, "batch", "length", *[None] * (x.ndim - 3), "embed_act")

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return Normalize(self.config.norm, name=name)(x)


def layer_parameters(stack: Any, layer: Layer, cross: Attention | None = None) -> int:
    """Trainable scalars of a layer described in full."""
    branches = [part for part in _parts(layer, cross) if part is not None]
    norms = {"sandwich": 2 * len(branches), "parallel_shared": 1}.get(stack.placement, len(branches))
    joins = 1 if stack.placement.startswith("parallel") else len(branches)
    per_norm = stack.width * len(stack.norm.vectors())
    inside = sum(part.parameters(stack.width) for part in branches)
    return inside + norms * per_norm + joins * stack.residual.parameters(stack.width)


def layer_entries(stack: Any, layer: Layer, cross: Attention | None = None) -> int:
    """Entries of its matrices, each of which multiplies every token once."""
    return sum(part.entries(stack.width) for part in _parts(layer, cross) if part is not None)


def _parts(layer: Layer, cross: Attention | None) -> tuple[Mixer | FeedForward | None, ...]:
    mixer = None if isinstance(layer.attention, NoMixing) else layer.attention
    return mixer, cross, None if isinstance(layer.ffn, NoFeedForward) else layer.ffn
