"""A linear probe: how much of what a text is made of can be read off frozen hidden states by a linear map alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.core.types import Batch, Labelled, Metrics, Probed, Weighted

RIDGE = 1e-4  # of the features' mean square

Features = Callable[[Batch], jax.Array]  # -> [B, L, D]


def linear_probe(features: Features, probed: Probed, classes: int) -> Metrics:
    """The "accuracy" of a least-squares classifier on what it was not fitted to, and "chance": that of always the commonest class.

    Weights `[D + 1, C]` solve (XᵀX / N + λI) W = XᵀY / N over the N tokens that have a class, Y one-hot; what is read is the
    largest of C. Nothing but sums over tokens is kept, so any number of them can be fitted. Alain & Bengio 2017 probe so, with
    logistic regression.
    """

    def gram(labelled: Labelled) -> tuple[jax.Array, jax.Array]:
        x_ND, y_NC = _rows(features, labelled, classes)
        x_ND = x_ND * y_NC.sum(1, keepdims=True)
        return _product(x_ND.T, x_ND), _product(x_ND.T, y_NC)

    inner_DD, outer_DC = (sums.sum(0) for sums in jax.lax.map(gram, probed.fit))
    counts_C = outer_DC[-1]  # the last feature is 1
    inner_DD, outer_DC = inner_DD / counts_C.sum(), outer_DC / counts_C.sum()
    ridge_D = jnp.full(len(inner_DD), RIDGE * jnp.diag(inner_DD)[:-1].mean()).at[-1].set(0)
    weights_DC = jax.scipy.linalg.solve(inner_DD + jnp.diag(ridge_D), outer_DC, assume_a="pos")

    def scored(labelled: Labelled) -> Metrics:
        x_ND, y_NC = _rows(features, labelled, classes)
        said_N = jnp.argmax(_product(x_ND, weights_DC), 1)
        right = lambda class_N: Weighted((y_NC * jax.nn.one_hot(class_N, classes)).sum(), y_NC.sum())  # noqa: E731
        return {"accuracy": right(said_N), "chance": right(jnp.full_like(said_N, jnp.argmax(counts_C)))}

    return jax.tree.map(lambda sums: sums.sum(0), jax.lax.map(scored, probed.test))


def _rows(features: Features, labelled: Labelled, classes: int) -> tuple[jax.Array, jax.Array]:
    """Features `[N, D + 1]` float32, the last of them 1, and one-hot classes `[N, C]`, zero where there is none."""
    x_BLD = features(labelled.batch).astype(jnp.float32)
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    return jnp.pad(x_ND, ((0, 0), (0, 1)), constant_values=1.0), jax.nn.one_hot(labelled.classes.reshape(-1), classes)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
