"""What a layer is told besides its input: where its tokens stand, what it may look at, and how often it drops what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from llm_jax.nn.attention import Places


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at: an encoder's output `[B, M, D]`, and where its tokens stand."""

    hidden: jax.Array
    places: Places


@partial(jax.tree_util.register_dataclass, data_fields=["places", "shared", "rates", "memory"], meta_fields=["slots"])
@dataclass(frozen=True)
class Context:
    """The same for all layers of a stack.

    shared: parameters of the positional scheme that the layers share. rates: site → dropout rate; absent sites drop nothing.
    memory: an encoder's output. slots: length of the key-value cache, or None for none.
    """

    places: Places
    shared: Mapping[str, jax.Array] = field(default_factory=dict)
    rates: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory | None = None
    slots: int | None = None

    @property
    def valid(self) -> jax.Array | None:
        """`[B, L]`: which tokens are no padding; None: all."""
        return None if self.places.segment is None else self.places.segment >= 0
