"""A stack of blocks: alike, or in a pattern that repeats; unrolled, or scanned so that one period is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive, substitute, traced_values
from llm_jax.core.platform import traits
from llm_jax.models.block import Block, Layer
from llm_jax.models.pipeline import Schedule, pipeline, schedule_of
from llm_jax.nn.context import Context
from llm_jax.nn.dropout import Dropout
from llm_jax.nn.ffn import Dense, FeedForward
from llm_jax.nn.linear import Precision
from llm_jax.nn.masks import Prefix
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, Norm, Normalize, Placement
from llm_jax.nn.position import Position, Positions, Rope
from llm_jax.nn.residual import NoResidual, Residual

# what the backward pass keeps of a block instead of computing it again; "none" keeps all
REMAT = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
COLLECTIONS = ("params", "cache", "intermediates", "routing")  # what a layer may leave, one entry a layer


@dataclass(frozen=True)
class Stack(Config):
    """`depth` layers of `width` channels.

    first: what the first layers do differently, an entry each; pattern: then this repeats to the end (empty: all alike).
    layers: "scanned" compiles one period of the pattern and stacks the layers' parameters, "unrolled" compiles each; "auto" asks
    the platform. remat: what the backward pass recomputes.
    """

    width: int = 128
    depth: int = 4
    attention: Mixer = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=Dense)
    position: Position = field(default_factory=Rope)
    norm: Norm = field(default_factory=LayerNorm)
    placement: Placement = "pre"
    residual: Residual = field(default_factory=Residual)
    dropout: Dropout = field(default_factory=Dropout)
    first: tuple[Layer, ...] = ()
    pattern: tuple[Layer, ...] = ()
    layers: Literal["auto", "unrolled", "scanned"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"
    precision: Precision = field(default_factory=Precision)

    def validate(self):
        require_positive(self, "width", "depth")
        fits = len(self.first) <= self.depth
        require(fits, "first", f"describes {len(self.first)} layers, but depth={self.depth}: shorten it or deepen the model")
        for where, layer in {"": Layer(), **self.described}.items():
            self._check_heads(self.resolved(layer), where)
        single = self.placement in ("pre", "sandwich", "parallel", "parallel_shared")
        require(
            self.residual.streams == 1 or single,
            "residual",
            f"keeps {self.residual.streams} copies of the stream, which placement={self.placement!r} cannot normalize: take 'pre'",
        )
        kept = not (isinstance(self.residual, NoResidual) and "layer" in self.dropout.rates())
        require(kept, "dropout.layer", "drops whole branches, and without a residual nothing is left: take another residual")

    @property
    def described(self) -> dict[str, Layer]:
        """Where each kind of layer that there is is described ("": by the stack alone), and what it does differently."""
        rest = self.depth - len(self.first)
        pattern = {f"pattern[{i}].": layer for i, layer in enumerate(self.pattern[:rest])} if self.pattern else {"": Layer()}
        return {f"first[{i}].": layer for i, layer in enumerate(self.first)} | (pattern if rest else {})

    def resolved(self, layer: Layer) -> Layer:
        """The layer with everything that it takes from the stack."""
        return Layer(layer.attention or self.attention, layer.ffn or self.ffn, layer.position or self.position)

    def _check_heads(self, layer: Layer, where: str) -> None:
        mixer, position = layer.attention, layer.position
        if isinstance(mixer, Attention):
            whole = mixer.head_dim is not None or self.width % mixer.heads == 0
            sentence = f"must divide width={self.width} unless attention.head_dim is given, got {mixer.heads}"
            require(whole, f"{where}attention.heads", sentence)
        turned = mixer.turned(self.width) if mixer else None
        if turned is not None and isinstance(position, Rope):
            sentence = f"turns pairs of channels, but a head has only {turned}: use fewer heads or a larger fraction"
            require(int(turned * position.fraction) >= 2, f"{where}position", sentence)

    @property
    def scanned(self) -> bool:
        """Whether the layers are one scanned body: the platform likes it, or they are recomputed, which XLA:CPU undoes unrolled."""
        return traits().scan_layers or self.remat != "none" if self.layers == "auto" else self.layers == "scanned"

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats."""
        return len(self.pattern) or 1

    @property
    def repeats(self) -> int:
        """How often the whole pattern occurs."""
        return (self.depth - len(self.first)) // self.period

    @property
    def kinds(self) -> list[Layer]:
        """What each layer does differently, from the first to the last."""
        pattern = self.pattern or (Layer(),)
        return [*self.first, *(pattern[i % len(pattern)] for i in range(self.depth - len(self.first)))]

    def place(self, index: int) -> tuple[str, ...]:
        """Where in the stack's parameters a layer lies; those of a scanned pattern lie together, along a leading axis."""
        start = len(self.first)
        together = self.scanned and start <= index < start + self.repeats * self.period
        return ("layers", f"step_{(index - start) % self.period}") if together else (f"layers_{index}",)

    @property
    def in_full(self) -> list[Layer]:
        """What each layer is, from the first to the last."""
        return [self.resolved(layer) for layer in self.kinds]

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on a later one."""
        return all(part.causal for kind in self.in_full for part in (kind.attention, kind.ffn) if part)

    @property
    def sees_later(self) -> str:
        """What it is of the stack that shows a token later ones; empty if nothing does."""
        for where, layer in self.described.items():
            whole = self.resolved(layer)
            for name, part in (("attention", whole.attention), ("ffn", whole.ffn)):
                if part and not part.causal:
                    return where + name
        return ""

    @property
    def prefix_mask(self) -> str:
        """Where a mask shows a prefix, as a path; empty if none does."""
        masks = {where: getattr(self.resolved(layer).attention, "mask", None) for where, layer in self.described.items()}
        return next((f"{where}attention.mask" for where, mask in masks.items() if isinstance(mask, Prefix)), "")

    @property
    def position_takers(self) -> list[Mixer]:
        """What mixes in each layer that attends by the stack's own position."""
        layers = [layer for layer in self.in_full if layer.attention and layer.attention.attends]
        return [layer.attention for layer in layers if layer.attention and layer.position == self.position]

    @property
    def heads_for_bias(self) -> int:
        """Heads of a bias that all layers share."""
        return next(iter(self.position_takers), self.attention).heads_for_bias


def enter(config: Stack, x_BLD: jax.Array, positions_BL: jax.Array, *, unit: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The embedded tokens with positions, and what the scheme shares between layers; a submodule of the calling module.

    unit: deviation of the entries of a token embedding.
    """
    return Positions(config.position, name="position")(x_BLD, positions_BL, unit=unit, heads=config.heads_for_bias)


def layers(config: Stack, x_BLD: jax.Array, context: Context, *, cross: Attention | None = None) -> jax.Array:
    """`[B, L, D] -> [B, L, D]` through all blocks and, unless they end with one, a norm; submodules of the calling module."""
    # rates reach the layers in the context: a module's fields must not hold tracers where Linen lifts it
    plain = substitute(config, dict.fromkeys(traced_values(config, kinds=object), 0.0))
    x, first, end = config.residual.open(x_BLD), len(config.first), len(config.first) + config.repeats * config.period
    for index, kind in enumerate(config.kinds):
        if config.scanned and first <= index < end:
            x = _scan(plain, x, context, cross) if index == first else x
        else:
            x = _remat(config, Block)(plain, kind, cross, name=f"layers_{index}")(x, jnp.int32(index), context)
    x_BLD = config.residual.close(x)
    return x_BLD if config.placement == "post" else Normalize(config.norm, name="final_norm")(x_BLD)


def _scan(config: Stack, x: jax.Array, context: Context, cross: Attention | None) -> jax.Array:
    starts = len(config.first) + config.period * jnp.arange(config.repeats, dtype=jnp.int32)
    schedule = schedule_of(len(x))
    if schedule is None:
        return _lifted(config)(config, cross, name="layers")(x, starts, context)[0]
    return _Staged(config, cross, schedule, name="layers")(x, starts, context)


def _lifted(config: Stack) -> Any:
    """All periods of the pattern as one module, whose parameters are stacked."""
    return nn.scan(
        _remat(config, _Period),
        variable_axes=dict.fromkeys(COLLECTIONS, 0),
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=config.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class _Staged(nn.Module):
    """The same, with the parameters where `_lifted` has them, where devices have the layers in stages."""

    config: Stack
    cross: Attention | None
    schedule: Schedule

    @nn.compact
    def __call__(self, x: jax.Array, starts: jax.Array, context: Context) -> jax.Array:
        whole = _lifted(self.config)(self.config, self.cross)
        nn.share_scope(self, whole)
        if self.is_initializing() or context.slots is not None or self.is_mutable_collection("intermediates"):
            return whole(x, starts, context)[0]
        period, key = _Period(self.config, self.cross, parent=None), self.make_rng("dropout") if self.has_rng("dropout") else None
        counted = ["routing"] if self.is_mutable_collection("routing") else []

        def layer(params, x, number, context, micro, key):
            rngs = {} if key is None else {"dropout": jax.random.fold_in(jax.random.fold_in(key, number), micro)}
            start = len(self.config.first) + self.config.period * number
            (x, _), left = period.apply({"params": params}, x, start, context, rngs=rngs, mutable=counted)
            return x, left

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[self.config.remat])
        y, left = pipeline(layer, self.variables["params"], x, context, self.schedule, key)
        for name, value in left.get("routing", {}).items():
            self.put_variable("routing", name, value)
        return y


def _remat(config: Stack, module: Any) -> Any:
    if config.remat == "none":
        return module
    return nn.remat(module, prevent_cse=not config.scanned, policy=REMAT[config.remat])


class _Period(nn.Module):
    """One period of the pattern, in the form that `nn.scan` takes."""

    config: Stack
    cross: Attention | None

    @nn.compact
    def __call__(self, x: jax.Array, start: jax.Array, context: Context) -> tuple[jax.Array, None]:
        for step, kind in enumerate(self.config.pattern or (Layer(),)):
            x = Block(self.config, kind, self.cross, name=f"step_{step}")(x, start + step, context)
        return x, None


def smallest_pattern(kinds: Sequence[Layer]) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The shortest (first, pattern) that describe layers one by one, so that few are compiled."""
    depth = len(kinds)
    options = (
        (first, period)
        for first in range(depth)
        for period in range(1, depth - first + 1)
        if all(kinds[i] == kinds[i - period] for i in range(first + period, depth))
    )
    first, period = min(options, key=lambda pair: (sum(pair), pair[0]))
    pattern = tuple(kinds[first : first + period])
    return tuple(kinds[:first]), () if pattern == (Layer(),) else pattern
