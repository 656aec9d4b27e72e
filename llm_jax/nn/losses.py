"""Losses over logits, in float32 at least."""

import jax
import jax.numpy as jnp

from llm_jax.nn.kernels.product import row_sum


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] in nats and log Σ exp(logits), both `[B, L]` float32."""
    logits_BLV = logits_BLV.astype(jnp.promote_types(logits_BLV.dtype, jnp.float32))
    highest_BL1 = jax.lax.stop_gradient(logits_BLV.max(-1, keepdims=True))
    log_sum_BL1 = jnp.log(row_sum(jnp.exp(logits_BLV - highest_BL1)))
    target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], -1)
    # the highest and the target's logit cancel before the small logarithm is added, so that large logits cost no digits
    return (log_sum_BL1 + (highest_BL1 - target_BL1))[..., 0], (log_sum_BL1 + highest_BL1)[..., 0]
