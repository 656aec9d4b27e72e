"""The logit lens (nostalgebraist 2020): what the model would say if the layers after each one were left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import require
from llm_jax.core.types import Batch
from llm_jax.lab.inspection.subject import words
from llm_jax.models.intervention import intervened, unrolled
from llm_jax.models.model import Model, Params, unstack_layers


@dataclass(frozen=True)
class Lens:
    """Depth 0 is what enters the first layer, depth n what leaves the n-th; the last is the model itself. `N` = depth + 1.

    ids, probabilities `[N, B, L, k]`: the k likeliest tokens. right_rank `[N, B, L]`: how many tokens are likelier than the right
    one; right_probability. entropy in bits and divergence, KL(last layer || this one) in bits, `[N, B, L]`.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    right_rank: np.ndarray
    right_probability: np.ndarray
    entropy: np.ndarray
    divergence: np.ndarray


def streams(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[str, list[jax.Array]]:
    """Stack → the stream before its first layer and after each, `[B, L, D]` (`[B, L, n, D]` where it is n copies)."""
    found: dict[str, list[jax.Array]] = {name: [] for name in model.stacks}

    def record(stack, layer, block, x):
        if layer == 0:
            found[stack].append(x)
        found[stack].append(block(x))
        return found[stack][-1]

    def run(params, batch):
        for kept in found.values():
            kept.clear()
        intervened(plain, vocabulary, params, batch, around=record)
        return found

    plain, alone = unrolled(model), unstack_layers(params, model)
    by_stack = jax.jit(run)(alone, batch)
    return {name: by_stack[name] for name in model.stacks}  # jit sorts by name


def read_stream(model: Model, vocabulary: int, params: Params, batch: Batch, x: jax.Array) -> jax.Array:
    """`[B, L, V]`: the logits of a stream of the last stack, through what follows the last layer: its norm and the head."""
    last = list(model.stacks)[-1]
    return intervened(model, vocabulary, params, batch, around=lambda stack, layer, block, own: x if stack == last else own)


def logit_lens(model: Model, vocabulary: int, params: Params, batch: Batch, *, top: int = 5) -> Lens:
    """The lens at every depth of the last stack. Raises `ConfigError` for a model that scores no token ids."""
    words(model)
    require(1 <= top <= vocabulary, "top", f"must be between 1 and the vocabulary {vocabulary}, got {top}")
    plain, alone = unrolled(model), unstack_layers(params, model)
    depths = list(streams(plain, vocabulary, alone, batch).values())[-1]
    read = jax.jit(partial(read_stream, plain, vocabulary))
    final_BLV = read(alone, batch, depths[-1])
    judge = jax.jit(partial(_judged, top=top))
    # one depth at a time: the vocabulary is large
    rows = [jax.device_get(judge(read(alone, batch, x), final_BLV, batch.targets)) for x in depths]
    return Lens(*(np.stack(column) for column in zip(*rows, strict=True)))


def _judged(logits_BLV: jax.Array, final_BLV: jax.Array, right_BL: jax.Array, *, top: int) -> tuple[jax.Array, ...]:
    log_BLV, last_BLV = jax.nn.log_softmax(logits_BLV), jax.nn.log_softmax(final_BLV)
    p_BLV = jnp.exp(log_BLV)
    best_BLk, ids_BLk = jax.lax.top_k(log_BLV, top)
    right_BL1 = jnp.take_along_axis(log_BLV, right_BL[..., None], -1)
    rank_BL = (log_BLV > right_BL1).sum(-1)
    entropy_BL = -(p_BLV * log_BLV).sum(-1) / jnp.log(2.0)
    divergence_BL = (jnp.exp(last_BLV) * (last_BLV - log_BLV)).sum(-1) / jnp.log(2.0)
    return ids_BLk, jnp.exp(best_BLk), rank_BL, jnp.exp(right_BL1[..., 0]), entropy_BL, divergence_BL
