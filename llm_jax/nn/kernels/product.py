"""Dense products and row sums: the two primitives everything else in `nn` is written with."""

import math

import jax
import jax.numpy as jnp

from llm_jax.core.platform import traits


def product(x: jax.Array, kernel: jax.Array, *, contract: int = 1) -> jax.Array:
    """`x [..., *I] · kernel [*I, *O] -> [..., *O]`, contracting the last `contract` dimensions of `x`.

    Where the platform asks for it, the weight gradient is written `(gᵀx)ᵀ` on flattened operands: autodiff's `xᵀg` makes
    XLA:CPU materialise transposed activations and recompute what produced them inside the copy (1.25–1.5× slower a step).
    """
    inputs, outputs = kernel.shape[:contract], kernel.shape[contract:]
    rows = x.shape[: x.ndim - contract]
    multiply = _product if traits().transposed_weight_gradient else jnp.matmul
    flat = multiply(x.reshape(-1, math.prod(inputs)), kernel.reshape(math.prod(inputs), math.prod(outputs)))
    return flat.reshape(*rows, *outputs)


@jax.custom_vjp
def _product(x, w):
    return x @ w


def _product_bwd(saved, g):
    x, w = saved
    return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ()))), jax.lax.dot_general(g, x, (((0,), (0,)), ((), ()))).T


_product.defvjp(lambda x, w: (x @ w, (x, w)), _product_bwd)


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, kept as an axis of one; `[..., n] -> [..., 1]` in f32."""
    if traits().row_sums_by_product:
        return x @ jnp.ones((x.shape[-1], 1), x.dtype)
    return x.sum(-1, keepdims=True)
