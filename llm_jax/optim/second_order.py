"""Curvature: Hutchinson's estimate of the Hessian's diagonal, and SOAP's eigenbasis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.optim.matrices import as_matrices, from_matrices, sizes


@jax.custom_batching.custom_vmap
def in_step(count: jax.Array) -> jax.Array:
    """`count`, taken to be the same for all members of a batch.

    The trials of a population have all made the same number of steps. Saying so keeps what happens every few steps a branch
    under `vmap`; from a batched count it would become a selection between both sides, computed at every step.
    """
    return count


@in_step.def_vmap
def _(size, batched, count):
    return in_step(count[0]), False


def branching(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` with every counter in its state put through `in_step`."""
    rule = optax.with_extra_args_support(rule)

    def update(updates, state, params=None, **extra):
        counted = jax.tree.map(lambda x: in_step(x) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) else x, state)
        return rule.update(updates, counted, params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def hutchinson() -> optax.GradientTransformationExtraArgs:
    """u ⊙ (H u) with random signs u, an unbiased estimate of the diagonal of the Hessian of `loss_fn`. Hutchinson 1989.

    The product is the derivative of the gradient along u: one forward over one reverse pass, about two gradients' work.
    """

    def update(updates, state, params=None, *, loss_fn, key, **_):
        signs = random_signs(key, params)
        products = jax.jvp(jax.grad(loss_fn), (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, signs, products), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def random_signs(key: jax.Array, like: Any) -> Any:
    """±1 with equal chances, shaped like `like`; leaves of one shape are drawn together, which compiles one generator for all
    layers instead of one a leaf."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(index)
    signs: dict = {}
    for (shape, dtype), indices in alike.items():
        draw = jax.vmap(lambda k, shape=shape, dtype=dtype: jax.random.rademacher(k, shape, dtype))
        signs |= dict(zip(indices, draw(keys[jnp.array(indices)]), strict=True))
    return tree.unflatten([signs[index] for index in range(len(leaves))])


TIES = 1e-2  # of a covariance's mean eigenvalue


class SoapState(NamedTuple):
    """Adam's moments (the second in the eigenbasis, both shaped like the parameters), and for each side of each matrix its
    gradient covariance `[batch, n, n]` and eigenbasis; sides that are not turned hold arrays of size 0."""

    step: jax.Array
    mean: Any
    square: Any
    covariances: Any
    bases: Any


class Leaf(NamedTuple):
    """What SOAP keeps for one parameter: the fields of `SoapState` without the counter."""

    mean: jax.Array
    square: jax.Array
    covariances: list[jax.Array]
    bases: list[jax.Array]


def scale_by_soap(
    axes: Callable[[Any], Any], *, b1: Any, b2: Any, frequency: int, largest: int, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Adam's update of the gradient QLᵀ G QR, turned back: QL N QRᵀ. Vyas et al. 2024, algorithm 3, and their code.

    axes: updates → (input axes, output axes) of every matrix. QL, QR: eigenvectors of the running means (decay b2) of G Gᵀ
    and Gᵀ G; they start as those of the first gradient, which is used for nothing else, then follow by one power iteration
    and QR every `frequency` steps. A gradient is always turned by the basis of the steps before it.
    """

    def init(params):
        def sides(p, pair):
            turned = [n if n <= largest else 0 for n in sizes(p, pair)]
            return [jnp.zeros((as_matrices(p, pair).shape[0], n, n), jnp.float32) for n in turned]

        mean, square = (optax.tree.zeros_like(params) for _ in range(2))
        covariances, bases = (jax.tree.map(sides, params, axes(params)) for _ in range(2))
        return SoapState(jnp.zeros((), jnp.int32), mean, square, covariances, bases)

    def update(updates, state, params=None):
        count = in_step(state.step)
        leaves, tree = jax.tree.flatten(updates)
        kept = zip(*(tree.flatten_up_to(part) for part in state[1:]), strict=True)
        steps, new = [], []
        for g, pair, leaf in zip(leaves, tree.flatten_up_to(axes(updates)), kept, strict=True):
            step, leaf = _adam_in_basis(g, pair, Leaf(*leaf), count, b1, b2, epsilon)
            steps.append(step)
            new.append(_follow(g, pair, leaf, count, b2, frequency))
        parts = [tree.unflatten([leaf[i] for leaf in new]) for i in range(len(Leaf._fields))]
        return tree.unflatten(steps), SoapState(count + 1, *parts)

    return optax.GradientTransformation(init, update)


def _adam_in_basis(g, pair, leaf: Leaf, count, b1, b2, epsilon) -> tuple[jax.Array, Leaf]:
    """One leaf's update and its new moments; 0 at the first step, which has no basis yet."""
    g = jnp.where(count > 0, g, 0.0)
    turned = from_matrices(_rotate(as_matrices(g, pair), leaf.bases), g, pair)
    mean = b1 * leaf.mean + (1 - b1) * g
    square = b2 * leaf.square + (1 - b2) * jnp.square(turned)
    steps = jnp.maximum(count, 1)
    first = _rotate(as_matrices(mean, pair), leaf.bases) / (1 - b1**steps)
    step = first / (jnp.sqrt(as_matrices(square, pair) / (1 - b2**steps)) + epsilon)
    return from_matrices(_rotate(step, leaf.bases, back=True), g, pair), leaf._replace(mean=mean, square=square)


def _follow(g, pair, leaf: Leaf, count, b2, frequency: int) -> Leaf:
    """The leaf with its covariances averaged and, when it is time, its bases turned."""
    G = as_matrices(g, pair)
    fresh = [jnp.einsum("bij,bkj->bik", G, G), jnp.einsum("bij,bik->bjk", G, G)]
    covariances = [b2 * old + (1 - b2) * new if old.size else old for old, new in zip(leaf.covariances, fresh, strict=True)]

    def first(square, bases):
        return square, [jnp.linalg.eigh(_definite(c))[1] if c.size else q for c, q in zip(covariances, bases, strict=True)]

    def turn(square, bases):
        V = as_matrices(square, pair)
        new = []
        for side, (c, q) in enumerate(zip(covariances, bases, strict=True), start=1):
            if c.size:
                q, V = _iterate(c, q, V, side)
            new.append(q)
        return from_matrices(V, square, pair), new

    which = jnp.where(count == 0, 0, jnp.where(count % frequency == 0, 1, 2))
    square, bases = jax.lax.switch(which, [first, turn, lambda square, bases: (square, bases)], leaf.square, leaf.bases)
    return Leaf(leaf.mean, square, covariances, bases)


def _definite(covariance):
    """The covariance with a small diagonal that rises along the axis.

    A side longer than the rank of what was seen has an eigenvalue zero many times over, whose eigenvectors would be made of
    rounding errors: other ones in every program, on every machine.
    """
    n = covariance.shape[-1]
    mean = jnp.trace(covariance, axis1=-2, axis2=-1)[:, None, None] / n
    return covariance + TIES * mean * jnp.diag(jnp.linspace(1.0, 2.0, n))[None]


def _iterate(covariance, basis, V, side: int):
    """One power iteration and QR, directions in falling order of their eigenvalue estimates, and V's `side` in that order.

    Both need the full precision of float32, which accelerators do not give products by default.
    """
    product = jnp.einsum("bij,bjk->bik", _definite(covariance), basis, precision=jax.lax.Precision.HIGHEST)
    order = jnp.argsort(-jnp.einsum("bji,bji->bi", basis, product), axis=-1)
    shape = [order.shape[0], 1, 1]
    shape[side] = order.shape[1]
    basis = jnp.linalg.qr(jnp.take_along_axis(product, order[:, None, :], axis=2))[0]
    return basis, jnp.take_along_axis(V, order.reshape(shape), axis=side)


def _rotate(G, bases, *, back: bool = False):
    """QLᵀ G QR, or `back` QL G QRᵀ; a side without a basis stays as it is."""
    left, right = bases
    if left.size:
        G = jnp.einsum("bij,bjk->bik" if back else "bji,bjk->bik", left, G)
    if right.size:
        G = jnp.einsum("bij,bkj->bik" if back else "bij,bjk->bik", G, right)
    return G
