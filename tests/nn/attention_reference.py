"""Attention and its gradient in closed form, float64 NumPy: what every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_jax.nn import attention as masks

# whether a query at place q sees a key at place k, which have positions i and j in their document, by each mask's definition
RULES = {
    masks.Bidirectional: lambda m, q, k, i, j, prefix: True,
    masks.Causal: lambda m, q, k, i, j, prefix: k <= q,
    masks.Prefix: lambda m, q, k, i, j, prefix: k <= q or prefix,
    masks.SlidingWindow: lambda m, q, k, i, j, prefix: (k <= q or not m.causal) and (abs(q - k) < m.window or j < m.sinks),
    masks.Chunked: lambda m, q, k, i, j, prefix: k <= q and j // m.size == i // m.size,
}


def seen(mask, queries, keys, query_documents=None, key_documents=None, prefix=None, positions=None) -> np.ndarray:
    """`[B, L, M]`, pair by pair. queries, keys: places `[B, L]`, `[B, M]`; positions: of both, or as their places."""
    B, L, M = *queries.shape, keys.shape[1]
    query_positions, key_positions = positions or (queries, keys)
    shown = np.zeros((B, L, M), bool)
    for b, q, k in np.ndindex(B, L, M):
        places = queries[b, q], keys[b, k], query_positions[b, q], key_positions[b, k]
        shown[b, q, k] = RULES[type(mask)](mask, *places, prefix is not None and prefix[b, k])
        if query_documents is not None:
            shown[b, q, k] &= query_documents[b, q] == key_documents[b, k] >= 0
    return shown


@dataclass
class Expected:
    """The result, and the gradients of Σ g ⊙ result; `scores`: with respect to what was added to the scores, `[B, H, L, M]`."""

    out: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    sinks: np.ndarray | None


def expected(q, k, v, g, shown, *, bias=0.0, soft_cap=None, sinks=None, scale=None) -> Expected:
    """softmax(cap·tanh(scale·QKᵀ/cap) + bias) V over the keys shown and a sink, and p ⊙ (dp - Σ p ⊙ dp) pulled back."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    B, L, H, K = q.shape
    groups, scale = k.shape[2], 1 / np.sqrt(K) if scale is None else scale
    wide = [np.repeat(x, H // groups, 2) for x in (k, v)]
    raw = scale * np.einsum("blhk,bmhk->bhlm", q, wide[0])
    slope = 1.0
    if soft_cap is not None:
        slope = 1 - np.tanh(raw / soft_cap) ** 2
        raw = soft_cap * np.tanh(raw / soft_cap)
    s = np.where(shown[:, None], raw + bias, -np.inf)
    sink = np.full((B, H, L, 1), -np.inf) if sinks is None else np.broadcast_to(sinks[None, :, None, None], (B, H, L, 1))
    top = np.maximum(np.maximum(s.max(-1, keepdims=True), sink), -1e300)
    weights, extra = np.exp(s - top), np.exp(sink - top)
    total = np.maximum(weights.sum(-1, keepdims=True) + extra, 1e-300)
    p, dp = weights / total, np.einsum("blhv,bmhv->bhlm", g, wide[1])
    mean = (p * dp).sum(-1, keepdims=True)
    ds = p * (dp - mean)

    def shared(x_BMHK):
        return x_BMHK.reshape(*x_BMHK.shape[:2], groups, H // groups, -1).sum(3)

    return Expected(
        out=np.einsum("bhlm,bmhv->blhv", p, wide[1]),
        q=scale * np.einsum("bhlm,bmhk->blhk", ds * slope, wide[0]),
        k=shared(scale * np.einsum("bhlm,blhk->bmhk", ds * slope, q)),
        v=shared(np.einsum("bhlm,blhv->bmhv", p, g)),
        scores=ds,
        sinks=None if sinks is None else -(extra / total * mean).sum((0, 2, 3)),
    )
