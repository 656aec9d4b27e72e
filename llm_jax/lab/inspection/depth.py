"""How large the residual stream and the gradients are at each depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch
from llm_jax.lab.inspection.lens import streams
from llm_jax.lab.inspection.subject import mean_loss, words
from llm_jax.models.intervention import intervened, unrolled
from llm_jax.models.model import Model, Params, unstack_layers

PARTS = ("attention", "cross", "ffn")  # a layer's modules end with these: norm_ffn, norm_after_attention, …


@dataclass(frozen=True)
class Depths:
    """Of one stack; depth 0 is what enters its first layer, depth n what leaves the n-th. `N` = depth + 1.

    stream `[N, B, L]`: root mean square over the channels of each place. gradient `[N]`: norm of the loss's gradient with
    respect to the stream, over all places. Where the stream is n copies, they count as channels.
    """

    stream: np.ndarray
    gradient: np.ndarray


def stream_sizes(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[str, np.ndarray]:
    """Stack → root mean square of the stream at each depth and place, `[N, B, L]`."""
    rms = lambda x: np.sqrt(np.square(np.asarray(x, np.float32)).mean(tuple(range(2, x.ndim))))  # noqa: E731
    return {name: np.stack([rms(x) for x in found]) for name, found in streams(model, vocabulary, params, batch).items()}


def by_depth(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[str, Depths]:
    """Stack → sizes of stream and gradient. Raises `ConfigError` for a model that scores no token ids, so has no such loss."""
    words(model)
    sizes, gradients = stream_sizes(model, vocabulary, params, batch), stream_gradients(model, vocabulary, params, batch)
    norm = lambda x: float(jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum()))  # noqa: E731
    return {name: Depths(sizes[name], np.array([norm(g) for g in gradients[name]])) for name in sizes}


def stream_gradients(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[str, list[jax.Array]]:
    """Stack → gradient of the mean loss with respect to the stream at each depth: what a zero that is added there would get."""
    plain, alone = unrolled(model), unstack_layers(params, model)

    def loss(offsets, params, batch):
        def shifted(stack, layer, block, x):
            x = x + offsets[stack][0] if layer == 0 else x
            return block(x) + offsets[stack][layer + 1]

        return mean_loss(intervened(plain, vocabulary, params, batch, around=shifted), batch)

    shapes = jax.eval_shape(lambda p, b: streams(plain, vocabulary, p, b), alone, batch)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.jit(jax.grad(loss))(zeros, alone, batch)


def parameter_gradients(model: Model, vocabulary: int, params: Params, batch: Batch) -> dict[str, dict[str, float]]:
    """Place ("embedding", "layers_0", "decoder/layers_0", "head", …) → part → norm of the mean loss's gradient.

    The parts of a layer are "attention", "cross" and "ffn", each with its norms, and "other"; another place is "all" of one piece.
    """
    words(model)
    plain, alone = unrolled(model), unstack_layers(params, model)

    def loss(params, batch):
        inputs, given = plain.arguments(batch)
        return mean_loss(plain.build(vocabulary).apply({"params": params}, *inputs, **given), batch)

    return _grouped(jax.jit(jax.grad(loss))(alone, batch), list(model.stacks))


def _grouped(gradients: Mapping[str, Any], stacks: list[str]) -> dict[str, dict[str, float]]:
    squares: dict[str, dict[str, float]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        names = [key.key for key in path]
        place = "/".join(names[: 2 if names[0] in stacks else 1])
        part = _part(names[names.index(place.rpartition("/")[2]) + 1]) if "layers_" in place else "all"
        parts = squares.setdefault(place, {})
        parts[part] = parts.get(part, 0.0) + float(jnp.square(leaf.astype(jnp.float32)).sum())
    return {place: {part: value**0.5 for part, value in parts.items()} for place, parts in _in_order(squares).items()}


def _part(name: str) -> str:
    return next((part for part in PARTS if name.endswith(part)), "other")


def _in_order(found: dict[str, Any]) -> dict[str, Any]:
    """Places in the order in which the network uses them; layers by number."""
    late = ("final_norm", "head")

    def key(place: str):
        stack, _, name = place.rpartition("/")
        number = re.fullmatch(r"layers_(\d+)", name)
        return (place == "head", stack, name in late, number is not None, int(number[1]) if number else 0, name)

    return {place: found[place] for place in sorted(found, key=key)}
