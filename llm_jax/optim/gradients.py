"""What happens to gradients and updates around an optimizer: clipping, decay, the scheduled learning rate."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Factor = Callable[[jax.Array], jax.Array]  # step -> fraction of the peak learning rate


class Steps(NamedTuple):
    """How many updates a transformation has made."""

    count: jax.Array


def clip_by_global_norm(largest) -> optax.GradientTransformation:
    """Gradients scaled down to a global norm of `largest` (may be traced); `None` leaves them alone. Pascanu et al. 2013."""
    if largest is None:
        return optax.identity()

    def update(updates, state, params=None):
        norm = optax.global_norm(updates)
        scale = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scheduled(learning_rate, factor: Factor) -> optax.GradientTransformation:
    """Updates times -learning_rate · factor(step)."""

    def update(updates, state, params=None):
        rate = -learning_rate * factor(state.count)
        return jax.tree.map(lambda u: rate * u, updates), Steps(state.count + 1)

    return optax.GradientTransformation(lambda params: Steps(jnp.zeros((), jnp.int32)), update)


def decayed(weight_decay, roles: Any) -> optax.GradientTransformation:
    """Updates plus weight_decay · parameter for matrices and tables, not for vectors (scales, biases)."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()

    def update(updates, state, params=None):
        grow = lambda u, p, role: u if role == "vector" else u + weight_decay * p  # noqa: E731
        return jax.tree.map(grow, updates, params, where_present(roles, updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def where_present(tree: Any, updates: Any) -> Any:
    """`tree` without the leaves that are masked out of `updates`."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda u, x: u if masked(u) else x, updates, tree, is_leaf=masked)
