"""Dense products, row sums and the softmax: the primitives everything else in `nn` is written with."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.platform import traits
from llm_jax.core.sharding import split_axes


def product(x: jax.Array, kernel: jax.Array, *, contract: int = 1, result: Any = None) -> jax.Array:
    """`x [..., *I] · kernel [*I, *O] -> [..., *O]`, contracting the last `contract` dimensions of `x`.

    result: the dtype of the sums where it is not the operands': f32 logits of bf16 activations are not rounded on the way. Where
    the platform asks for it, the weight gradient is written `(gᵀx)ᵀ` on flattened operands: autodiff's `xᵀg` makes XLA:CPU
    materialise transposed activations and recompute what produced them inside the copy (1.25–1.5× slower a step).
    """
    inputs, outputs = kernel.shape[:contract], kernel.shape[contract:]
    rows = x.shape[: x.ndim - contract]
    cut = "sequence" in split_axes()  # rows and their tokens, split over different axes, make no one dimension that is split
    written_out = traits().transposed_weight_gradient and (result is None or result == x.dtype) and not cut
    multiply = _product if written_out else partial(jnp.matmul, preferred_element_type=result)
    flat = multiply(x.reshape(*(rows if cut else (-1,)), math.prod(inputs)), kernel.reshape(math.prod(inputs), math.prod(outputs)))
    return flat.reshape(*rows, *outputs)


def products(x: jax.Array, kernels: Sequence[jax.Array], *, contract: int = 1) -> list[jax.Array]:
    """`product` of one `x` with several kernels; where the platform asks for it, and kernels are whole, as a single wider one.

    Narrow products leave a core waiting: three of 64 columns run at half the speed of one of 192.
    """
    if len(kernels) == 1 or not traits().products_together or split_axes() - {"data"}:
        return [product(x, kernel, contract=contract) for kernel in kernels]
    inputs, outputs = kernels[0].shape[:contract], [kernel.shape[contract:] for kernel in kernels]
    columns = [kernel.reshape(*inputs, -1) for kernel in kernels]
    wide = product(x, jnp.concatenate(columns, -1), contract=contract)
    ends = list(itertools.accumulate(c.shape[-1] for c in columns))
    return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(jnp.split(wide, ends[:-1], -1), outputs, strict=True)]


@jax.custom_vjp
def _product(x, w):
    return x @ w


def _product_bwd(saved, g):
    x, w = saved
    transposed = jax.lax.dot_general(g, x, (((0,), (0,)), ((), ())))
    if w.shape[0] > w.shape[1]:  # XLA would fold the transposition into the product, which is slower with long columns
        transposed = jax.lax.optimization_barrier(transposed)
    return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ()))), transposed.T


_product.defvjp(lambda x, w: (x @ w, (x, w)), _product_bwd)


def widened(x: jax.Array) -> jax.Array:
    """In float32 where it is narrower."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, kept as an axis of one; `[..., n] -> [..., 1]` in f32."""
    if traits().row_sums_by_product:
        return x @ jnp.ones((x.shape[-1], 1), x.dtype)
    return x.sum(-1, keepdims=True)


def _softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / row_sum(e)


@jax.custom_vjp
def softmax(x: jax.Array) -> jax.Array:
    """exp(x) / Σ exp(x) over the last axis, `[..., n]` f32. Its gradient p ⊙ (g - Σ g ⊙ p) keeps the result alone."""
    return _softmax(x)


def _softmax_fwd(x):
    p = _softmax(x)  # not `softmax`: Hessian-vector products differentiate this forwards, which a custom VJP refuses
    return p, p


softmax.defvjp(_softmax_fwd, lambda p, g: (p * (g - row_sum(g * p)),))
