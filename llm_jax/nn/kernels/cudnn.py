"""Flash attention of cuDNN, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.nn.kernels.call import Call, Kernel
from llm_jax.nn.masks import Bidirectional, Causal, SlidingWindow, visible


def attend(call: Call) -> jax.Array:
    """`[B, L, H, V]`."""
    given = arguments(call)
    out = jax.nn.dot_product_attention(call.q_BLHK, call.k_BMGK, call.v_BMGV, **given, implementation="cudnn")
    if given.get("mask") is None or not call.lonely:
        return out
    return jnp.where(given["mask"].any(-1).swapaxes(1, 2)[..., None], out, 0)  # cuDNN averages over what it cannot see


def arguments(call: Call) -> dict[str, Any]:
    """The keyword arguments that say the same to `dot_product_attention`."""
    given = {"scale": call.scale} | (_named(call) or {"mask": _written(call)})
    if call.bias is not None:
        queries, keys = _whole(call)
        given["bias"] = call.bias(queries.index, keys.index).astype(call.q_BLHK.dtype)
    return given


def _named(call: Call) -> dict[str, Any] | None:
    """The mask by its name, where cuDNN knows it; None: it must be written out."""
    L, M = call.lengths
    if not call.counted or call.queries.segment is not None or call.keys.segment is not None:
        return None
    if isinstance(call.mask, Bidirectional):
        return {"is_causal": False}
    if isinstance(call.mask, Causal) and L == M:
        return {"is_causal": True}
    if isinstance(call.mask, SlidingWindow) and call.mask.causal and not call.mask.sinks and L == M:
        return {"is_causal": True, "local_window_size": (call.mask.window - 1, 0)}
    return None


def _written(call: Call) -> jax.Array | None:
    """`[B or 1, 1, L, M]`."""
    seen = visible(call.mask, *_whole(call))
    return None if seen is None else seen[:, None]


def _whole(call: Call):
    (L, M) = call.lengths
    return call.queries.rows(0, L), call.keys.rows(0, M)


def refusal(call: Call) -> str | None:
    """Why cuDNN cannot."""
    return _missing() or _arithmetic(call) or _shapes(call)


def _missing() -> str | None:
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU in this process, which runs on {jax.default_backend()}"
    return None


def _arithmetic(call: Call) -> str | None:
    dtypes = {x.dtype for x in (call.q_BLHK, call.k_BMGK, call.v_BMGV)}
    if call.sinks_H is not None:
        return "has no learned sinks"
    if call.soft_cap is not None:
        return "cannot cap scores"
    if call.key is not None:
        return "takes no dropout of attention weights through JAX"
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"computes in bfloat16 or float16, and was given {', '.join(sorted(map(str, dtypes)))}"
    if not isinstance(call.scale, (int, float)):
        return "needs a scale that is a plain number"
    return None


def _shapes(call: Call) -> str | None:
    size, width, greatest = call.q_BLHK.shape[-1], call.v_BMGV.shape[-1], _greatest_head()
    if size != width:
        return f"needs values as wide as keys, got {width} and {size} channels"
    if size % 8 or size > greatest:
        return f"needs heads of a multiple of 8 and at most {greatest} channels, got {size}"
    if quadratic(call) and any(length % 2 for length in call.lengths):
        return f"needs even lengths for this mask or bias, got {call.lengths[0]} queries and {call.lengths[1]} keys"
    return None


def _greatest_head() -> int:
    """Of Hopper and later, or of GPUs before."""
    return 256 if float(getattr(jax.local_devices()[0], "compute_capability", 9.0)) >= 9 else 128


def quadratic(call: Call) -> bool:
    """Whether a mask or a bias is written out."""
    return call.bias is not None or _named(call) is None


CUDNN = Kernel(attend, refusal, quadratic)
