"""Parameters as stacks of matrices `[batch, inputs, outputs]`, which is how matrix-aware optimizers see them."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

Axes = tuple[tuple[int, ...], tuple[int, ...]]  # (input axes, output axes) of a leaf; the others count separate matrices


def layout(x: Any, pair: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with (batch axes, input axes, output axes) in that order, and the permutation that makes it."""
    inputs, outputs = pair
    order = (*(i for i in range(x.ndim) if i not in (*inputs, *outputs)), *inputs, *outputs)
    return tuple(x.shape[i] for i in order), order


def sizes(x: Any, pair: Axes) -> tuple[int, int]:
    """How many inputs and outputs each of the matrices has."""
    inputs, outputs = (math.prod(x.shape[i] for i in part) for part in pair)
    return inputs, outputs


def as_matrices(x: jax.Array, pair: Axes) -> jax.Array:
    """`x` as `[batch, inputs, outputs]`."""
    return x.transpose(layout(x, pair)[1]).reshape(-1, *sizes(x, pair))


def from_matrices(x: jax.Array, like: Any, pair: Axes) -> jax.Array:
    """The inverse of `as_matrices`, back to the shape of `like`."""
    shape, order = layout(like, pair)
    return x.reshape(shape).transpose(tuple(order.index(i) for i in range(len(order))))


def masked(x: Any) -> bool:
    """Whether `optax.partition` has put the mark of an absent leaf here."""
    return isinstance(x, optax.MaskedNode)


def where_present(tree: Any, updates: Any) -> Any:
    """`tree` without the leaves that `optax.partition` has masked out of `updates`."""
    return jax.tree.map(lambda u, x: u if masked(u) else x, updates, tree, is_leaf=masked)


def every_axes(params: Any, roles: Any, axes: Any) -> Any:
    """`axes` completed for leaves that have none: a table is one matrix, a vector is a column `[n, 1]`.

    Leaves below "layers" carry a leading layer axis, which counts separate vectors.
    """

    def complete(path, leaf, role, pair) -> Axes:
        if pair is not None:
            return pair
        if role == "vector":
            return tuple(range(path[0] == jax.tree_util.DictKey("layers"), leaf.ndim)), ()
        return tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)

    return jax.tree_util.tree_map_with_path(complete, params, roles, axes)


def matrix_by_matrix(rule: optax.GradientTransformation, roles: Any, axes: Any) -> optax.GradientTransformation:
    """`rule` applied to every matrix alone, so that scanned layers and split heads are treated like unrolled 2-d kernels.

    Its state is a tree like the parameters, whose leaves are the rule's states with a leading axis that counts matrices.
    """

    def init(params):
        every = every_axes(params, roles, axes)
        return jax.tree.map(lambda p, pair: jax.vmap(rule.init)(as_matrices(p, pair)), params, every)

    def update(updates, state, params=None):
        pairs = jax.tree.structure(updates).flatten_up_to(every_axes(updates, roles, axes))
        leaves, tree = jax.tree.flatten(updates)
        steps, states = [], []
        for g, pair, s, p in zip(leaves, pairs, tree.flatten_up_to(state), jax.tree.leaves(params), strict=True):
            step, new = jax.vmap(rule.update)(as_matrices(g, pair), s, as_matrices(p, pair))
            steps.append(from_matrices(step, g, pair))
            states.append(new)
        return tree.unflatten(steps), tree.unflatten(states)

    return optax.GradientTransformation(init, update)
