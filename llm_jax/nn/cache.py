"""The key-value cache: what earlier calls computed of a sequence, kept in Linen's collection "cache"."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.nn.masks import Places


def extend(module: nn.Module, name: str, new_BL: jax.Array, index_BL: jax.Array, slots: int) -> jax.Array:
    """`[B, slots, …]`: what `module` has kept under `name`, with the new entries `[B, L, …]` written to their places in the row.

    A token's slot is its index. So right-padded rows need no mask: a query sees no slot after its own, and padding there is
    overwritten as the row grows. Entries beyond the last slot are dropped, and so are those with a negative index.
    """
    batch = max(new_BL.shape[0], index_BL.shape[0])
    kept = module.variable("cache", name, jnp.zeros, (batch, slots, *new_BL.shape[2:]), new_BL.dtype)
    index_BL = jnp.broadcast_to(index_BL, (batch, new_BL.shape[1]))
    index_BL = jnp.where(index_BL < 0, slots, index_BL)  # -1 would be the last slot
    kept.value = kept.value.at[jnp.arange(batch)[:, None], index_BL].set(new_BL, mode="drop")
    return kept.value


def keys(module: nn.Module, queries: Places, index_BL: jax.Array, slots: int) -> Places:
    """Where the kept keys stand: in the slot of their index, and in the prefix and at the position that came with them."""
    prefix, position = queries.prefix, queries.position
    return Places(
        prefix=None if prefix is None else extend(module, "prefix", prefix, index_BL, slots),
        position=None if position is None else extend(module, "positions", position, index_BL, slots),
    )
