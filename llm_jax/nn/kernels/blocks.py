"""Losses and scores of tokens by blocks of them, straight from the output layer: the array of all logits never exists.

A block's logits are made, judged and, in training, differentiated before the next block's are. The sum of the losses is what is
returned, not each of them, so that its gradient is known but for one factor while the logits are there, and nothing is computed
twice, as it would be if the vocabulary were cut as well (Wijmans et al. 2024: 4 products for 3). Gradients with respect to the
matrix are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.platform import traits
from llm_jax.core.sharding import axes_over, constrain, parts
from llm_jax.nn.kernels.unembedding import Unembedding

WHOLE = PartitionSpec()

# `(values, logits [N, V], targets, a tree of [N, ...]) -> a tree of [N]`, plain JAX and pure: numbers that are traced, and all else
# that may be, go through `values` or `targets`
Judge = Callable[[Mapping[str, Any], jax.Array, Any], Any]


def at_once(unembedding: Unembedding) -> bool:
    """Whether the logits of all tokens `[B, L, V]` are so few on each device that they may as well be made."""
    return _blocks(unembedding) <= 1


def block_count(tokens: int, vocabulary: int) -> int:
    """How many blocks so many tokens of one device are taken in."""
    return max(1, min(-(-tokens * vocabulary // traits().logits_at_once), -(-tokens // traits().tokens_at_once)))


def each(judge: Judge, unembedding: Unembedding, targets: Any, values: Mapping[str, Any]) -> Any:
    """What `judge` says of every token, a tree of `[B, L]`; targets: a tree of `[B, L, ...]`. It is not to be differentiated."""
    count = _blocks(unembedding)

    def local(unembedding, targets, values):
        return _mapped(judge, count, unembedding, targets, values)

    axes, tokens = _split(unembedding)
    if not axes:
        return local(unembedding, targets, values)
    return _on_tokens(local, axes, (_specs(unembedding, tokens), tokens, WHOLE), tokens)(unembedding, targets, values)


def total(judge: Judge, unembedding: Unembedding, targets: Any, weights_BL: jax.Array, values: Mapping[str, Any]) -> jax.Array:
    """Σ weight · `judge`'s loss, a scalar, with its gradient for the output layer and the weights, and none for targets and values.

    A derivative forwards is refused; Hessian-vector products as the derivative of the gradient are not.
    """
    count, (axes, tokens) = _blocks(unembedding), _split(unembedding)
    # over these each device keeps its part of the matrix's gradient alone, as the matrix itself is split
    own = tuple(axis for axis in axes_over("embed", unembedding.hidden.shape[-1]) if axis in axes)
    dimension = int(unembedding.table)

    @jax.custom_vjp
    def summed(unembedding, targets, weights_BL, values):
        return (each(judge, unembedding, targets, values) * weights_BL).sum()

    def forward(unembedding, targets, weights_BL, values):
        def local(*given):
            sums, by_token = _differentiated(judge, count, *given)
            return _added(sums, axes, own, dimension) if axes else sums, by_token

        if axes:
            ins = (_specs(unembedding, tokens), tokens, tokens, WHOLE)
            split = {"matrix": PartitionSpec(*[None] * dimension, own or None), "bias": WHOLE}
            outs = (WHOLE, {name: split[name] for name in _trained(unembedding)}), tokens
            (result, grads), (loss_BL, hidden_BLD) = _on_tokens(local, axes, ins, outs)(unembedding, targets, weights_BL, values)
        else:
            (result, grads), (loss_BL, hidden_BLD) = local(unembedding, targets, weights_BL, values)
        return result, (replace(unembedding, hidden=hidden_BLD, **grads), loss_BL)

    def backward(saved, g):
        grads, loss_BL = saved
        kept = jax.tree.map(lambda x, like: (g * x).astype(like.dtype), grads, unembedding)
        return kept, None, (g * loss_BL).astype(weights_BL.dtype), None

    summed.defvjp(forward, backward)
    return summed(unembedding, targets, weights_BL, values)


# ── blocks of one device ─────────────────────────────────────────────────────────────────────────────────────────────
def _blocks(unembedding: Unembedding) -> int:
    """How many blocks the tokens of a device are taken in."""
    rows, length = unembedding.hidden.shape[:2]
    tokens = rows * length // parts(_split(unembedding)[0])
    ids = unembedding.vocabulary // parts(axes_over("vocab_act", unembedding.vocabulary))
    return block_count(tokens, ids)


def _cut(tree: Any, count: int) -> Any:
    """Arrays `[B, L, ...]` as `[count, N, ...]`, filled up with zeros."""

    def cut(x):
        tokens = x.shape[0] * x.shape[1]
        size = -(-tokens // count)
        x = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(x, [(0, count * size - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _joined(x: jax.Array, like: jax.Array) -> jax.Array:
    """`[count, N, ...]` as `[B, L, ...]`, without what was filled up."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: like.shape[0] * like.shape[1]].reshape(*like.shape[:2], *x.shape[1:])


def _judged(judge: Judge, unembedding: Unembedding, targets: Any, values: Mapping[str, Any]) -> Any:
    return judge(values, constrain(unembedding.logits(), None, "vocab_act"), targets)


def _mapped(judge: Judge, count: int, unembedding: Unembedding, targets: Any, values: Mapping[str, Any]) -> Any:
    def block(given):
        x_ND, targets = given
        return _judged(judge, replace(unembedding, hidden=x_ND), targets, values)

    found = jax.lax.map(block, _cut((unembedding.hidden, targets), count))
    return jax.tree.map(lambda x: _joined(x, unembedding.hidden), found)


def _differentiated(
    judge: Judge, count: int, unembedding: Unembedding, targets: Any, weights_BL: jax.Array, values: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(Σ weight · loss, its gradients for matrix and bias), and (the losses, the gradient for the hidden states) by token."""

    def weighted(unembedding, targets, weights_N):
        loss_N = _judged(judge, unembedding, targets, values)
        return (loss_N * weights_N).sum(), loss_N

    def step(sums, given):
        x_ND, *more = given
        (value, loss_N), grads = jax.value_and_grad(weighted, has_aux=True)(replace(unembedding, hidden=x_ND), *more)
        found = value, {name: getattr(grads, name) for name in sums[1]}
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, found), (loss_N, grads.hidden)

    wide = jnp.promote_types(unembedding.hidden.dtype, jnp.float32)
    shapes = _trained(unembedding)
    start = jnp.zeros((), wide), {name: jnp.zeros(x.shape, wide) for name, x in shapes.items()}
    with jax.named_scope("gradient"):
        sums, by_token = jax.lax.scan(step, start, _cut((unembedding.hidden, targets, weights_BL), count))
    return sums, jax.tree.map(lambda x: _joined(x, unembedding.hidden), by_token)


# ── a mesh ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _split(unembedding: Unembedding) -> tuple[tuple[str, ...], PartitionSpec]:
    """The mesh axes that split the tokens, and how an array `[B, L, ...]` of tokens is split."""
    rows, length = (axes_over(name, size) for name, size in zip(("batch", "length"), unembedding.hidden.shape, strict=False))
    return rows + length, PartitionSpec(rows or None, length or None)


def _specs(unembedding: Unembedding, tokens: PartitionSpec) -> Unembedding:
    return replace(jax.tree.map(lambda _: WHOLE, unembedding), hidden=tokens)


def _trained(unembedding: Unembedding) -> dict[str, jax.Array]:
    return {name: getattr(unembedding, name) for name in ("matrix", "bias") if getattr(unembedding, name) is not None}


def _added(sums: tuple[jax.Array, dict[str, jax.Array]], axes: tuple[str, ...], own: tuple[str, ...], dimension: int) -> Any:
    """The sums of all devices; of the matrix's each keeps its part along a dimension, over its `own` axes."""
    value, grads = sums
    rest = tuple(axis for axis in axes if axis not in own)
    if own:
        part = jax.lax.psum_scatter(grads["matrix"], own, scatter_dimension=dimension, tiled=True)
        grads = grads | {"matrix": jax.lax.psum(part, rest) if rest else part}
    summed = {name: jax.lax.psum(x, axes) for name, x in grads.items() if name != "matrix" or not own}
    return jax.lax.psum(value, axes), grads | summed


def _on_tokens(local: Callable, axes: tuple[str, ...], ins: Any, outs: Any) -> Callable:
    """`local` on each device's tokens, where sums stay until all are there; the vocabulary may be split further inside."""
    return jax.shard_map(local, in_specs=ins, out_specs=outs, axis_names=set(axes), check_vma=False)
