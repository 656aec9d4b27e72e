"""Attention by blocks of queries and keys, whose scores are never written out (FlashAttention; Dao et al. 2022, Dao 2023).

A query block meets key blocks one after another and keeps its running maximum m, the sum Σ exp(s - m) and Σ exp(s - m) v. Only the
result and log Σ exp(s) are kept for the backward pass, which makes the weights anew, block by block: memory is linear in length.
Blocks that the mask hides from each other are not visited. Both passes are plain operations, so Hessian-vector products work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.platform import traits
from llm_jax.nn.dropout import dropout
from llm_jax.nn.kernels.call import MASKED, Call, Kernel
from llm_jax.nn.masks import Mask, Places, visible

FLOOR = MASKED / 2  # of the running maximum: a masked score then weighs exp(MASKED - FLOOR), which is exactly 0


class Rule(NamedTuple):
    """How scores are made, apart from arrays."""

    mask: Mask
    bias: Callable[[Any, jax.Array, jax.Array], jax.Array] | None
    soft_cap: float | None
    dtype: Any


class Side(NamedTuple):
    """Places by blocks, `[n, B or 1, block]`. inside: what is no filling, where the last block is filled up."""

    index: jax.Array
    segment: jax.Array | None
    prefix: jax.Array | None
    position: jax.Array | None
    inside: jax.Array | None


class Context(NamedTuple):
    """What is not differentiated. meets: for each query block the key blocks, those that it meets first; counts: how many."""

    queries: Side
    keys: Side
    meets: jax.Array
    counts: jax.Array
    rate: jax.Array
    key: jax.Array | None


class Arrays(NamedTuple):
    """What is differentiated: scaled q `[n, B, G, R, r, K]`, k `[n, B, G, c, K]`, v `[n, B, G, c, V]`, sinks `[G, R]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    params: Any
    sinks: jax.Array | None


# ── cutting into blocks ──────────────────────────────────────────────────────────────────────────────────────────────
def attend(call: Call) -> jax.Array:
    """`[B, L, H, V]`. Scores, softmax and sums are float32."""
    rows, columns = (block(length) for length in call.lengths)
    return joined(_attend(rule(call), arrays(call, rows, columns), context(call, rows, columns)), call.lengths[0])


def rule(call: Call) -> Rule:
    """How the call's scores are made."""
    return Rule(call.mask, None if call.bias is None else call.bias.function, call.soft_cap, call.dtype)


def arrays(call: Call, rows: int, columns: int) -> Arrays:
    """Queries in blocks of so many rows, keys and values in blocks of so many columns."""
    q_BGRLK, k_BGMK, v_BGMV = call.heads()
    return Arrays(
        _cut(q_BGRLK, 3, rows),
        _cut(k_BGMK, 2, columns),
        _cut(v_BGMV, 2, columns),
        None if call.bias is None else call.bias.params,
        None if call.sinks_H is None else call.sinks_H.reshape(q_BGRLK.shape[1:3]),
    )


def joined(out_nBGRrV: jax.Array, length: int) -> jax.Array:
    """The result by blocks as `[B, L, H, V]`."""
    out_BGRLV = _join(out_nBGRrV, 3)[:, :, :, :length]
    B, G, R, L, V = out_BGRLV.shape
    return out_BGRLV.transpose(0, 3, 1, 2, 4).reshape(B, L, G * R, V)


def block(length: int) -> int:
    """Blocks of equal length, at most the platform's."""
    return -(-length // -(-length // traits().attention_block))


def _cut(x: jax.Array, axis: int, block: int) -> jax.Array:
    """`[n, …, block, …]`, padded with zeros to whole blocks."""
    count = -(-x.shape[axis] // block)
    widths = [(0, count * block - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`, with the padding."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def context(call: Call, rows: int, columns: int) -> Context:
    """Where the call's tokens stand, and which blocks meet."""
    L, M = call.lengths
    meets, counts = _meetings(call, rows, columns)
    queries, keys = _side(call.queries, L, rows), _side(call.keys, M, columns)
    return Context(queries, keys, jnp.asarray(meets), jnp.asarray(counts), jnp.asarray(call.rate, jnp.float32), call.key)


def _side(places: Places, length: int, block: int) -> Side:
    whole = places.rows(0, length)
    inside = None if length % block == 0 else jnp.ones((1, length), bool)
    given = whole.index, whole.segment, whole.prefix, whole.position, inside
    return Side(*(None if x is None else _cut(x, 1, block) for x in given))  # type: ignore[arg-type]


def _meetings(call: Call, rows: int, columns: int) -> tuple[Any, Any]:
    """`[n, m]` and `[n]`: for each query block the key blocks, first those that hold what the mask's span allows, and their number.

    Where places are counted from 0 it is known before the program runs.
    """
    known = call.counted and not (call.packed and call.mask.anchors)
    (L, M), np_or_jnp = call.lengths, np if known else jnp
    first, last = _extent(call.queries.index, L, rows)
    least, most = _extent(call.keys.index, M, columns)
    low, high = call.mask.span(first[:, None], last[:, None], packed=call.packed)
    near = np_or_jnp.ones((first.size, least.size), bool)
    if low is not None:
        near = near & (most[None] >= low)
    if high is not None:
        near = near & (least[None] < high)
    if call.mask.anchors:
        least = least if call.keys.position is None else _extent(call.keys.position, M, columns)[0]
        near = near | (least < call.mask.anchors)[None]
    return np_or_jnp.argsort(~near, axis=1, stable=True).astype(np.int32), near.sum(1).astype(np.int32)


def _extent(index: jax.Array | None, length: int, block: int) -> tuple[Any, Any]:
    """The least and the greatest index in each block."""
    if index is None:
        starts = np.arange(0, length, block)
        return starts, np.minimum(starts + block, length) - 1
    padded = jnp.pad(index, ((0, 0), (0, -length % block)), "edge")
    blocks = padded.reshape(index.shape[0], -1, block)
    return blocks.min((0, 2)), blocks.max((0, 2))


# ── the two passes ───────────────────────────────────────────────────────────────────────────────────────────────────
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, arrays: Arrays, context: Context) -> jax.Array:
    """`[n, B, G, R, r, V]`."""
    return _fwd(rule, arrays, context)[0]


def _fwd(rule: Rule, arrays: Arrays, context: Context):
    out, log_sum = forward(rule, arrays, context)
    out = out.astype(arrays.v.dtype)
    return out, (arrays, context, out, log_sum)


def forward(rule: Rule, arrays: Arrays, context: Context) -> tuple[jax.Array, jax.Array]:
    """The result `[n, B, G, R, r, V]` and log Σ exp(s), `[n, B, G, R, r]`, in the dtype of sums."""
    start, width = _start(rule, arrays), arrays.v.shape[-1]

    def rows(_, i):
        q = arrays.q[i]

        def meet(t, state):
            m, total, sums = state
            j = context.meets[i, t]
            s = _finish(rule, context, i, j, _product(rule, q, arrays.k[j]), arrays.params)
            top = jax.lax.stop_gradient(jnp.maximum(m, s.max(-1)))
            shrink, p = jnp.exp(m - top), jnp.exp(s - top[..., None])
            weighted = _weighted(rule, _drop(context, i, j, p), arrays.v[j])
            return top, total * shrink + p.sum(-1), sums * shrink[..., None] + weighted

        zero = jnp.zeros((*q.shape[:-1], width), rule.dtype)
        m, total, sums = jax.lax.fori_loop(0, context.counts[i], meet, (*start, zero))
        total = jnp.where(total > 0, total, 1)  # a query that sees nothing
        return None, (sums / total[..., None], m + jnp.log(total))

    return jax.lax.scan(rows, None, jnp.arange(arrays.q.shape[0]))[1]


def _start(rule: Rule, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The running maximum and sum before any key: nothing, or the sink with weight exp(sink - m)."""
    shape = arrays.q.shape[1:-1]
    if arrays.sinks is None:
        return jnp.full(shape, FLOOR, rule.dtype), jnp.zeros(shape, rule.dtype)
    sinks = jnp.broadcast_to(arrays.sinks.astype(rule.dtype)[None, :, :, None], shape)
    top = jax.lax.stop_gradient(jnp.maximum(sinks, FLOOR))
    return top, jnp.exp(sinks - top)


def _bwd(rule: Rule, saved, g):
    given, context, out, log_sum = saved
    grads = backward(rule, given, context, out, log_sum, g)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), grads, given), None


def backward(rule: Rule, arrays: Arrays, context: Context, out: jax.Array, log_sum: jax.Array, g: jax.Array) -> Arrays:
    """The gradient of all arrays, in the dtype of sums. out and log_sum may be of more keys than these.

    With D the kept weights / (1 - rate), δ = g·out: dv = (p⊙D)ᵀg, ds = p⊙(D⊙(g vᵀ) - δ).
    """
    delta = (g.astype(rule.dtype) * out.astype(rule.dtype)).sum(-1)

    def rows(sums, i):
        q, g_i = arrays.q[i], g[i]

        def meet(t, state):
            dq, (dk, dv, dparams) = state
            j = context.meets[i, t]
            k, v = arrays.k[j], arrays.v[j]
            s, pull = jax.vjp(partial(_finish, rule, context, i, j), _product(rule, q, k), arrays.params)
            p = jnp.exp(s - log_sum[i][..., None])
            ds = p * (_drop(context, i, j, _product(rule, g_i, v)) - delta[i][..., None])
            ds, dparam = pull(ds)
            dk = _add(dk, j, _transposed(rule, ds, q))
            dv = _add(dv, j, _transposed(rule, _drop(context, i, j, p), g_i))
            return dq + _weighted(rule, ds, k), (dk, dv, jax.tree.map(jnp.add, dparams, dparam))

        dq, sums = jax.lax.fori_loop(0, context.counts[i], meet, (jnp.zeros(q.shape, rule.dtype), sums))
        return sums, dq

    zeros = (
        jnp.zeros(arrays.k.shape, rule.dtype),
        jnp.zeros(arrays.v.shape, rule.dtype),
        jax.tree.map(jnp.zeros_like, arrays.params),
    )
    (dk, dv, dparams), dq = jax.lax.scan(rows, zeros, jnp.arange(arrays.q.shape[0]))
    return Arrays(dq, dk, dv, dparams, sinks_gradient(rule, arrays, out, log_sum, g))


def sinks_gradient(rule: Rule, arrays: Arrays, out: jax.Array, log_sum: jax.Array, g: jax.Array) -> jax.Array | None:
    """-Σ exp(sink - log Σ) δ, `[G, R]`; None without sinks."""
    if arrays.sinks is None:
        return None
    delta = (g.astype(rule.dtype) * out.astype(rule.dtype)).sum(-1)
    share = jnp.exp(arrays.sinks.astype(rule.dtype)[None, None, :, :, None] - log_sum)
    return -(share * delta).sum((0, 1, 4))


_attend.defvjp(_fwd, _bwd)


# ── a block ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _product(rule: Rule, x_BGRrK: jax.Array, y_BGcK: jax.Array) -> jax.Array:
    """x yᵀ, `[B, G, R, r, c]`: the R query heads of a group are rows of one product."""
    B, G, R, r, K = x_BGRrK.shape
    s = jnp.matmul(x_BGRrK.reshape(B, G, R * r, K), y_BGcK.swapaxes(-1, -2), preferred_element_type=rule.dtype)
    return s.reshape(B, G, R, r, -1)


def _weighted(rule: Rule, p_BGRrc: jax.Array, y_BGcK: jax.Array) -> jax.Array:
    """p y, `[B, G, R, r, K]`."""
    B, G, R, r, c = p_BGRrc.shape
    p = p_BGRrc.astype(y_BGcK.dtype).reshape(B, G, R * r, c)
    return jnp.matmul(p, y_BGcK, preferred_element_type=rule.dtype).reshape(B, G, R, r, -1)


def _transposed(rule: Rule, p_BGRrc: jax.Array, x_BGRrK: jax.Array) -> jax.Array:
    """pᵀx, `[B, G, c, K]`, added up over the heads of a group."""
    B, G, R, r, c = p_BGRrc.shape
    p, x = p_BGRrc.astype(x_BGRrK.dtype).reshape(B, G, R * r, c), x_BGRrK.reshape(B, G, R * r, -1)
    return jnp.matmul(p.swapaxes(-1, -2), x, preferred_element_type=rule.dtype)


def _finish(rule: Rule, context: Context, i, j, s_BGRrc: jax.Array, params: Any) -> jax.Array:
    """Scores from products: cap, bias, mask."""
    _, G, R, r, c = s_BGRrc.shape
    queries, keys = (jax.tree.map(lambda x: x[index], side) for side, index in ((context.queries, i), (context.keys, j)))
    if rule.soft_cap is not None:
        s_BGRrc = rule.soft_cap * jnp.tanh(s_BGRrc / rule.soft_cap)
    if rule.bias is not None:
        s_BGRrc = s_BGRrc + rule.bias(params, queries.index, keys.index).reshape(-1, G, R, r, c).astype(s_BGRrc.dtype)
    seen = visible(rule.mask, Places(*queries[:4]), Places(*keys[:4]))
    if keys.inside is not None:
        seen = keys.inside[:, None] if seen is None else seen & keys.inside[:, None]
    return s_BGRrc if seen is None else jnp.where(seen[:, None, None], s_BGRrc, MASKED)


def _drop(context: Context, i, j, p: jax.Array) -> jax.Array:
    """Dropout with a key of the block's own, so that both passes drop the same."""
    key = None if context.key is None else jax.random.fold_in(context.key, i * context.meets.shape[1] + j)
    return dropout(p, context.rate, key)


def _add(sums: jax.Array, j, x: jax.Array) -> jax.Array:
    """`sums[j] += x`, in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(sums, jax.lax.dynamic_index_in_dim(sums, j, keepdims=False) + x, j, 0)


BLOCKWISE = Kernel(attend)
