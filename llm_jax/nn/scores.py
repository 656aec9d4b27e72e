"""How good predictions are, token by token, and how far their probabilities may be believed."""

import jax
import jax.numpy as jnp

from llm_jax.core.types import Weighted
from llm_jax.nn.kernels.product import widened

BINS = 15  # Guo et al. 2017


def rank(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """How many ids come before the target, `[..., V]` to `[...]` int32: it is among the first k if this is below k.

    Of equal logits the lower id comes first, as in argmax and `top_k`. NaN comes before everything, so that it is never a hit.
    """
    target = jnp.take_along_axis(logits, targets[..., None], -1)
    ids = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
    after = (logits < target) | ((logits == target) & (ids >= targets[..., None]))
    return (~after).sum(-1)


def confidence(logits: jax.Array) -> jax.Array:
    """The probability of the most probable id, `[..., V]` to `[...]` float32."""
    logits = widened(logits)
    return jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))


def calibration_sums(confidence: jax.Array, hits: jax.Array, weights: jax.Array) -> Weighted:
    """Σ weight · (confidence - hit) and Σ weight of the tokens in each of `BINS` equal intervals of confidence: `[BINS]` each.

    They add up over batches; `calibration_error` makes one number of the sums.
    """
    index = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1).reshape(-1)
    inside = jax.nn.one_hot(index, BINS, dtype=confidence.dtype)
    weights = weights.reshape(-1)
    return Weighted(((confidence - hits).reshape(-1) * weights) @ inside, weights @ inside)


def calibration_error(sums: Weighted) -> Weighted:
    """Expected calibration error, the mean over tokens of |accuracy - confidence| of their interval (Guo et al. 2017, eq. 3)."""
    return Weighted(jnp.abs(sums.total).sum(), sums.weight.sum())
