"""What happens to gradients and updates around an optimizer: norms, clipping, decay, the scheduled learning rate, averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Factor = Callable[[jax.Array], jax.Array]  # step -> fraction of the peak learning rate


class Steps(NamedTuple):
    """How many updates a transformation has made."""

    step: jax.Array


def global_norm(tree: Any) -> jax.Array:
    """√ of the sum of squares of every number in `tree`."""
    return optax.tree.norm(tree)


def clip_by_global_norm(largest: Any) -> optax.GradientTransformation:
    """Gradients scaled down to a global norm of `largest` (may be traced); `None` leaves them alone. Pascanu et al. 2013."""
    if largest is None:
        return optax.identity()

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, largest / jnp.maximum(global_norm(updates), 1e-30))
        return jax.tree.map(lambda g: scale * g, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scheduled(learning_rate: Any, factor: Factor) -> optax.GradientTransformation:
    """Updates times -learning_rate · factor(step), where the first step is 0."""

    def update(updates, state, params=None):
        rate = -learning_rate * factor(state.step)
        return jax.tree.map(lambda u: rate * u, updates), Steps(state.step + 1)

    return optax.GradientTransformation(lambda params: Steps(jnp.zeros((), jnp.int32)), update)


def multiplied(rates: Any) -> optax.GradientTransformation:
    """Updates times a number each, a tree of them; `None` leaves them alone."""
    if rates is None:
        return optax.identity()

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, rate: u * rate, updates, rates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(weight_decay: Any, roles: Any) -> optax.GradientTransformation:
    """Updates plus weight_decay · parameter for matrices and tables, not for vectors (scales, biases)."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, p, role: u if role == "vector" else u + weight_decay * p, updates, params, roles), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def average(old: Any, new: Any, decay: Any) -> Any:
    """decay · old + (1 - decay) · new of two trees: one step of an exponential moving average. Polyak & Juditsky 1992."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def scale_by_adam(b1: Any, b2: Any, epsilon: float = 1e-8) -> optax.GradientTransformation:
    """m̂ / (√v̂ + ε) of Kingma & Ba 2015, with optax's state.

    Bias corrections are taken on scalars, which leaves one division an element where optax has three: a whole AdamW step is
    13% shorter on one CPU core (0.8 M parameters) and as fast as one written by hand for its tree.
    """

    def init(params):
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        count = state.count + 1
        mu = average(state.mu, updates, b1)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, updates, state.nu)
        first, second = 1 / (1 - b1**count), jax.lax.rsqrt(1 - jnp.asarray(b2, jnp.float32) ** count)
        step = jax.tree.map(lambda m, v: first * m / (second * jnp.sqrt(v) + epsilon), mu, nu)
        return step, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
