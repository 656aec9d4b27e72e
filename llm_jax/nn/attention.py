"""softmax(QKᵀ·scale + bias) V as one pure function, with masks, packed documents, and a choice of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from llm_jax.core.config import ConfigError
from llm_jax.core.platform import traits
from llm_jax.core.sharding import layout
from llm_jax.nn.kernels import sequence
from llm_jax.nn.kernels.blockwise import BLOCKWISE
from llm_jax.nn.kernels.call import Bias, Call, Kernel
from llm_jax.nn.kernels.cudnn import CUDNN
from llm_jax.nn.kernels.dense import DENSE
from llm_jax.nn.masks import Bidirectional, Causal, Chunked, Mask, Places, Prefix, SlidingWindow

__all__ = ["Backend", "Bias", "Bidirectional", "Causal", "Chunked", "Mask", "Places", "Prefix", "SlidingWindow", "attend"]

Backend = Literal["auto", "dense", "blockwise", "cudnn", "splash"]

CAUSAL = Causal()


def _splash() -> Kernel:
    from llm_jax.nn.kernels.splash import SPLASH  # Pallas takes a third of a second to import

    return SPLASH


KERNELS: dict[str, Callable[[], Kernel]] = {
    "dense": lambda: DENSE,
    "blockwise": lambda: BLOCKWISE,
    "cudnn": lambda: CUDNN,
    "splash": _splash,
}


def attend(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGV: jax.Array,
    *,
    mask: Mask = CAUSAL,
    queries: Places | None = None,
    keys: Places | None = None,
    bias: Bias | None = None,
    scale: Any = None,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    rate: Any = 0.0,
    key: jax.Array | None = None,
    backend: Backend = "auto",
    strict: bool = True,
) -> jax.Array:
    """Attention of H query heads over G key-value heads, each shared by H/G of them; `[B, L, H, V]`. What sees nothing is 0.

    queries, keys: where they stand; None is 0 … L-1, one document. scale: of the scores, 1/√K unless given. soft_cap:
    s → c·tanh(s/c) before bias and mask (Gemma 2). sinks: a learned logit for each head in the softmax's sum (gpt-oss). rate,
    key: dropout of the attention weights. Raises `ConfigError` where the back end cannot do what is asked for; strict=False takes
    that of "auto" then.
    """
    call = Call(
        q_BLHK,
        k_BMGK,
        v_BMGV,
        mask=mask,
        queries=queries or Places(),
        keys=keys or Places(),
        bias=bias,
        scale=1 / math.sqrt(q_BLHK.shape[-1]) if scale is None else scale,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
        rate=rate,
        key=None if isinstance(rate, (int, float)) and rate == 0 else key,
    )
    line, kernel = sequence.line_of(call), _kernel(backend, call, strict)
    if line and layout().context == "ring" and backend in ("auto", "blockwise"):
        return sequence.ring(call, line)
    if line is None or kernel.shares_rows:
        return kernel.attend(call)
    return sequence.gather(call, line, lambda own: _kernel(backend, own, strict=False).attend(own))


def _kernel(backend: str, call: Call, strict: bool = True) -> Kernel:
    if backend == "auto":
        return _choice(call)
    if backend not in KERNELS:
        raise ConfigError(f"must be one of auto, {', '.join(KERNELS)}, got {backend!r}", "backend")
    kernel = KERNELS[backend]()
    why = kernel.refusal(call)
    if why is not None and not strict:
        return _choice(call)
    if why is not None:
        raise ConfigError(f"{backend!r} {why}: use 'blockwise', which can do everything, or 'auto'", "backend")
    return kernel


def _choice(call: Call) -> Kernel:
    """The platform's own kernel where it can and writes nothing large out, else by size."""
    small = call.lengths[0] * call.lengths[1] <= traits().dense_attention
    name = traits().fused_attention
    if name is not None:
        fused = KERNELS[name]()
        if fused.refusal(call) is None and (small or not fused.quadratic(call)):
            return fused
    return DENSE if small else BLOCKWISE
