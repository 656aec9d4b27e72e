"""softmax(QKᵀ/√K + bias) V as a pure function, with masks for causality and packed documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.core.platform import traits
from llm_jax.nn.dropout import dropout
from llm_jax.nn.kernels.product import softmax

MASKED = -1e30
Bias = Callable[[jax.Array, jax.Array], jax.Array | None]  # (query positions [B, L], key positions [B, M]) -> [1 or B, H, L, M]


def attend(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    *,
    segments_BL: jax.Array | None = None,
    bias: Bias = lambda queries, keys: None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of H query heads over G key-value heads, each shared by H/G of them; `[B, L, H, K]`.

    A query sees the keys that stand no later in its row, and of its own segment. The bias is asked for with places in the row:
    within a document distances are the same, and one bias serves all rows. Scores and softmax are float32. rate, key: dropout
    of the attention weights.
    """
    length, block = q_BLHK.shape[1], traits().attention_row_block or q_BLHK.shape[1]
    q_BGRLK, k_BGMK, v_BGMK = _by_head(q_BLHK, k_BMGK.shape[2]), k_BMGK.transpose(0, 2, 1, 3), v_BMGK.transpose(0, 2, 1, 3)
    keys = jax.random.split(key, -(-length // block)) if key is not None else None
    rows = []
    for index, start in enumerate(range(0, length, block)):  # rows [start, stop) meet only keys [0, stop)
        stop = min(start + block, length)
        rows.append(
            _attend_rows(
                q_BGRLK[:, :, :, start:stop],
                k_BGMK[:, :, :stop],
                v_BGMK[:, :, :stop],
                mask=_visible(start, stop, segments_BL),
                bias=bias(jnp.arange(start, stop)[None], jnp.arange(stop)[None]),
                rate=rate,
                key=None if keys is None else keys[index],
            )
        )
    out_BGRLK = rows[0] if len(rows) == 1 else jnp.concatenate(rows, 3)
    return out_BGRLK.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


def _by_head(q_BLHK: jax.Array, groups: int) -> jax.Array:
    """`[B, G, H/G, L, K]`, divided by √K."""
    B, L, H, K = q_BLHK.shape
    return (q_BLHK * (1 / math.sqrt(K))).reshape(B, L, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _visible(start: int, stop: int, segments_BL: jax.Array | None) -> jax.Array:
    """`[B or 1, rows, keys]`: which keys [0, stop) the queries [start, stop) may see."""
    causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
    if segments_BL is None:
        return causal[None]
    return causal[None] & (segments_BL[:, start:stop, None] == segments_BL[:, None, :stop])


def _attend_rows(q_BGRLK, k_BGMK, v_BGMK, *, mask, bias, rate, key) -> jax.Array:
    B, G, R, L, K = q_BGRLK.shape
    M = k_BGMK.shape[2]
    s = jnp.matmul(q_BGRLK.reshape(B, G, R * L, K), k_BGMK.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    s = s.reshape(B, G, R, L, M)
    if bias is not None:
        s = s + bias.reshape(-1, G, R, L, M)
    s = jnp.where(mask[:, None, None], s, MASKED)
    p = dropout(softmax(s), rate, key).astype(v_BGMK.dtype)
    return (p.reshape(B, G, R * L, M) @ v_BGMK).reshape(B, G, R, L, K)
