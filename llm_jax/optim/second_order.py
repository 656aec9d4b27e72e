"""Curvature: Hutchinson's estimate of the Hessian's diagonal, and SOAP's eigenbasis."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def hutchinson() -> optax.GradientTransformationExtraArgs:
    """u ⊙ (H u) with random signs u, an unbiased estimate of the diagonal of the Hessian of `loss_fn`. Hutchinson 1989."""

    def update(updates, state, params=None, *, loss_fn, key, **_):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = jax.tree.unflatten(tree, [jax.random.rademacher(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)])
        products = jax.jvp(jax.grad(loss_fn), (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, signs, products), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class SoapState(NamedTuple):
    """Adam's moments (the second in the eigenbasis, both shaped like the parameters), and for each side of each matrix its
    gradient covariance `[…, n, n]` and eigenbasis; sides that are not turned hold arrays of size 0."""

    count: jax.Array
    mean: Any
    square: Any
    covariances: Any
    bases: Any


def scale_by_soap(axes: Callable[[Any], Any], *, b1, b2, frequency: int, largest: int, epsilon: float = 1e-8) -> optax.GradientTransformation:
    """Adam's update of the gradient QLᵀ G QR, turned back. Vyas et al. 2024.

    axes: updates → (input axes, output axes) of every matrix. The bases are the eigenvectors of the first gradient's
    covariances, then follow their running means by one step of power iteration and QR every `frequency` steps.
    """

    def init(params):
        def sides(p, pair):
            matrices = _as_matrices(p, pair)
            sizes = [n if n <= largest else 0 for n in matrices.shape[-2:]]
            return [jnp.zeros((matrices.shape[0], n, n), jnp.float32) for n in sizes]

        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        empty = jax.tree.map(sides, params, axes(params))
        return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(), empty, jax.tree.map(jnp.copy, empty))

    def update(updates, state, params=None):
        count = state.count + 1
        new = {path: _soap(g, pair, m, v, c, q, count, b1, b2, frequency, epsilon) for path, g, pair, m, v, c, q in _zipped(
            updates, axes(updates), state.mean, state.square, state.covariances, state.bases)}
        tree = jax.tree.structure(updates)
        parts = [jax.tree.unflatten(tree, [values[i] for values in new.values()]) for i in range(5)]
        return parts[0], SoapState(count, *parts[1:])

    return optax.GradientTransformation(init, update)


def _zipped(updates: Any, *others: Any):
    """For every leaf of `updates` its index, itself, and what stands there in the other trees."""
    leaves, tree = jax.tree.flatten(updates)
    columns = [tree.flatten_up_to(other) for other in others]
    return [(i, leaf, *(column[i] for column in columns)) for i, leaf in enumerate(leaves)]


def _soap(g, pair, mean, square, covariances, bases, count, b1, b2, frequency, epsilon):
    """One leaf's (update, mean, square, covariances, bases)."""
    shape, order, G = *_layout(g, pair), _as_matrices(g, pair)
    fresh = [jnp.einsum("bij,bkj->bik", G, G), jnp.einsum("bij,bik->bjk", G, G)]
    covariances = [jnp.where(count == 1, new, b2 * old + (1 - b2) * new) if old.shape[-1] else old
                   for old, new in zip(covariances, fresh, strict=True)]
    bases = [_turned(count, c, q, frequency) if q.shape[-1] else q for c, q in zip(covariances, bases, strict=True)]
    mean = b1 * mean + (1 - b1) * g
    square = b2 * square + (1 - b2) * _from_matrices(jnp.square(_rotate(G, bases)), shape, order)
    first = _rotate(_as_matrices(mean, pair), bases) / (1 - b1**count)
    step = first / (jnp.sqrt(_as_matrices(square, pair) / (1 - b2**count)) + epsilon)
    return _from_matrices(_rotate(step, bases, back=True), shape, order), mean, square, covariances, bases


def _turned(count, covariance, basis, frequency: int):
    """The eigenvectors at the first step, a QR iteration at every `frequency`-th, the same basis otherwise."""
    first = lambda c, q: jnp.linalg.eigh(c)[1]  # noqa: E731
    follow = lambda c, q: jnp.linalg.qr(c @ q)[0]  # noqa: E731
    which = jnp.where(count == 1, 0, jnp.where(count % frequency == 0, 1, 2))
    return jax.lax.switch(which, [first, follow, lambda c, q: q], covariance, basis)


def _rotate(G, bases, *, back: bool = False):
    left, right = bases
    if left.shape[-1]:
        G = jnp.einsum("bij,bjk->bik" if back else "bji,bjk->bik", left, G)
    if right.shape[-1]:
        G = jnp.einsum("bij,bkj->bik" if back else "bij,bjk->bik", G, right)
    return G


def _layout(x, pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with (batch axes, input axes, output axes) in that order, and the permutation that makes it."""
    inputs, outputs = pair
    order = (*(i for i in range(x.ndim) if i not in (*inputs, *outputs)), *inputs, *outputs)
    return tuple(x.shape[i] for i in order), order


def _as_matrices(x, pair):
    """`[batch, inputs, outputs]`."""
    shape, order = _layout(x, pair)
    inputs, outputs = (math.prod(x.shape[i] for i in part) for part in pair)
    return x.transpose(order).reshape(-1, inputs, outputs)


def _from_matrices(x, shape, order):
    return x.reshape(shape).transpose(tuple(order.index(i) for i in range(len(order))))
