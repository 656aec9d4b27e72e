"""The values that travel through the whole system: a batch of tokens, what a model says of it, and a weighted sum."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Token sequences and what is to be predicted from them; every array is `[..., B, L]`.

    `None` stands for the cheap common case, so that nothing is moved or masked for it: `weights=None` counts every target
    once, `segments=None` is one document a row, `positions=None` is 0 … L-1. inputs `[..., B, M]`: what an encoder reads, with
    input_segments and input_positions; prefix: bool, tokens that all others of their document may see.
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array | None = None
    segments: jax.Array | None = None
    positions: jax.Array | None = None
    inputs: jax.Array | None = None
    input_segments: jax.Array | None = None
    prefix: jax.Array | None = None
    input_positions: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Labelled:
    """Token sequences and a class for each token, int32 `[..., B, L]`; negative for none."""

    batch: Batch
    classes: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probed:
    """What a linear probe is fitted to, and what it is scored on; `[n, B, L]` both."""

    fit: Labelled
    test: Labelled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weighted:
    """A sum and its weight, kept apart so that micro-batches, hosts and packed rows add up exactly (f32 scalars)."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, value, weight=1.0) -> "Weighted":
        """`value` counted `weight` times."""
        weight = jnp.asarray(weight, jnp.float32)
        return cls(jnp.asarray(value, jnp.float32) * weight, weight)

    @property
    def mean(self):
        """total / weight; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.weight, 1e-30)


Metrics = dict[str, Weighted]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch.

    logits `[B, L, V]`; ahead: those of the tokens after the next one, one array each. penalty: what training adds to the loss.
    routing: what layers with experts counted, as `models.experts` reads it. unembeddings: what the logits and those ahead are made
    of (`nn.kernels.unembedding.Unembedding`), in this order, where the model says it. teacher: what the objective's teacher says of
    the same batch, in training.
    """

    logits: jax.Array
    ahead: tuple[jax.Array, ...] = ()
    penalty: Weighted | None = None
    routing: Any = field(default_factory=dict)
    unembeddings: tuple[Any, ...] = ()
    teacher: "Predictions | None" = None
