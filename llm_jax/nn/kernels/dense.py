"""Attention with its scores written out, by blocks of query rows where the platform asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llm_jax.core.platform import traits
from llm_jax.nn.dropout import dropout
from llm_jax.nn.kernels.call import MASKED, Call, Kernel
from llm_jax.nn.kernels.product import softmax
from llm_jax.nn.masks import bounds, visible


def attend(call: Call) -> jax.Array:
    """`[B, L, H, V]`. Scores and softmax are float32."""
    blocks = list(_blocks(call))
    q_BGRLK, k_BGMK, v_BGMV = call.heads()
    keys = jax.random.split(call.key, len(blocks)) if call.key is not None else None
    rows = []
    for index, (start, stop, low, high) in enumerate(blocks):
        q, k, v = q_BGRLK[:, :, :, start:stop], k_BGMK[:, :, low:high], v_BGMV[:, :, low:high]
        rows.append(_attend_rows(call, (start, stop, low, high), q, k, v, None if keys is None else keys[index]))
    out_BGRLV = rows[0] if len(rows) == 1 else jnp.concatenate(rows, 3)
    B, L, H, _ = call.q_BLHK.shape
    return out_BGRLV.transpose(0, 3, 1, 2, 4).reshape(B, L, H, -1)


def _blocks(call: Call) -> Iterator[tuple[int, int, int, int]]:
    """Query rows [start, stop) and the keys [low, high) that they meet: all, where places are not counted from 0."""
    L, M = call.lengths
    block = (traits().attention_row_block or L) if call.counted else L
    for start in range(0, L, block):
        stop = min(start + block, L)
        low, high = bounds(call.mask, start, stop - 1, M, packed=call.packed) if call.counted else (0, M)
        low = min(low, M - 1)  # rows past the last key they might see still meet one, unseen
        yield start, stop, low, max(high, low + 1)


def _attend_rows(call: Call, block: tuple[int, int, int, int], q_BGRLK, k_BGMK, v_BGMV, key) -> jax.Array:
    start, stop, low, high = block
    B, G, R, L, K = q_BGRLK.shape
    M = k_BGMK.shape[2]
    queries, keys = call.queries.rows(start, stop), call.keys.rows(low, high)
    s = jnp.matmul(q_BGRLK.reshape(B, G, R * L, K), k_BGMK.swapaxes(-1, -2), preferred_element_type=call.dtype)
    s = s.reshape(B, G, R, L, M)
    if call.soft_cap is not None:
        s = call.soft_cap * jnp.tanh(s / call.soft_cap)
    if call.bias is not None:
        s = s + call.bias(queries.index, keys.index).reshape(-1, G, R, L, M)
    seen = visible(call.mask, queries, keys)
    if seen is not None:
        s = jnp.where(seen[:, None, None], s, MASKED)
    p = dropout(_weights(s, call.sinks_H), call.rate, key).astype(v_BGMV.dtype)
    out = (p.reshape(B, G, R * L, M) @ v_BGMV).reshape(B, G, R, L, -1)
    if seen is None or not call.lonely:
        return out
    return jnp.where(seen.any(-1)[:, None, None, :, None], out, 0)


def _weights(s_BGRLM: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
    """The softmax, in whose sum a sink stands as one more key that has no value (gpt-oss)."""
    if sinks_H is None:
        return softmax(s_BGRLM)
    B, G, R, L, _ = s_BGRLM.shape
    sinks = jnp.broadcast_to(sinks_H.astype(s_BGRLM.dtype).reshape(1, G, R, 1, 1), (B, G, R, L, 1))
    return softmax(jnp.concatenate([s_BGRLM, sinks], -1))[..., :-1]


DENSE = Kernel(attend)
