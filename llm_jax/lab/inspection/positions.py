"""What a positional scheme does to a model: the vectors it adds, the scores it biases, and how it turns queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models.model import Model, Params
from llm_jax.models.stack import Stack
from llm_jax.nn.position import Learned, Position, Rope
from llm_jax.nn.rope import inverse_frequencies


@dataclass(frozen=True)
class Scheme:
    """A scheme where it is used.

    stack: "" or an encoder-decoder's "encoder" or "decoder"; layers: those of the stack that have it; width: the stack's. heads: of
    its bias. turned: channels of a head that it may turn, None for none. causal: whether no key is later than its query. unit:
    deviation of a token embedding's entries. params: its own.
    """

    stack: str
    layers: tuple[int, ...]
    position: Position
    width: int
    heads: int
    turned: int | None
    causal: bool
    unit: float
    params: Params

    @property
    def name(self) -> str:
        """Its class, as it is written in an experiment."""
        return type(self.position).__name__

    @property
    def longest(self) -> int | None:
        """The most places that it has; None: any number."""
        return self.position.max_length if isinstance(self.position, Learned) else None

    def param(self, name: str, *_: Any) -> jax.Array:
        """One of its parameters, as its hooks ask for it."""
        return jnp.asarray(self.params[name], jnp.float32)


@dataclass(frozen=True)
class Turning:
    """How rotary embeddings turn `W` pairs of channels. frequencies `[W]`: radians a place. distances `[N]`.

    attenuation `[N]`: score of a query with a key of the same content that far away, as a share of that at distance 0, averaged
    over contents: the mean cosine of all pairs. bound `[N]`: on any score, for contents that vary little from pair to pair: the
    mean over n of |Σ_{j<n} exp(i·d·f_j)|, as a share of that at distance 0. Su et al. 2021, §3.4.3.
    """

    frequencies: np.ndarray
    distances: np.ndarray
    attenuation: np.ndarray
    bound: np.ndarray


def schemes(model: Model, params: Params) -> list[Scheme]:
    """Every scheme of the model with the layers that use it; not those that do nothing (`NoPosition`) or that no layer uses."""
    return [found for name, stack in model.stacks.items() for found in _of_stack(model, name, stack, params)]


def _of_stack(model: Model, name: str, stack: Stack, params: Params) -> Iterator[Scheme]:
    used: dict[tuple[Position, int | None, int], list[int]] = {}
    if overrides(stack.position, "embed"):  # once, before the first layer
        used[stack.position, stack.attention.turned(stack.width), stack.heads_for_bias] = list(range(stack.depth))
    for index, kind in enumerate(stack.in_full):
        turned, own = kind.attention.turned(stack.width), overrides(kind.position, "rotate") or overrides(kind.position, "bias")
        layers = used.setdefault((kind.position, turned, kind.attention.heads_for_bias), []) if turned and own else [index]
        if index not in layers:
            layers.append(index)
    table = (params[name] if name else params).get("position", {})
    for (position, turned, heads), layers in used.items():
        yield Scheme(name, tuple(layers), position, stack.width, heads, turned, stack.causal, model.embedding.deviation, table)


def overrides(position: Position, hook: str) -> bool:
    """Whether the scheme does something by that hook: "embed", "rotate" or "bias"."""
    return getattr(type(position), hook) is not getattr(Position, hook)


def added(scheme: Scheme, length: int) -> np.ndarray:
    """`[L, D]` float32: the vector that each place adds to the embedding of its token."""
    zeros_BLD = jnp.zeros((1, length, scheme.width), jnp.float32)
    places_BL = jnp.arange(length)[None]
    return np.asarray(scheme.position.embed(zeros_BLD, places_BL, unit=scheme.unit, param=scheme.param))[0]


def similarity(vectors_LD: np.ndarray) -> np.ndarray:
    """`[L, L]`: cosine between the vectors of every two places."""
    unit_LD = vectors_LD / np.maximum(np.linalg.norm(vectors_LD, axis=-1, keepdims=True), 1e-30)
    return unit_LD @ unit_LD.T


def biases(scheme: Scheme, length: int) -> np.ndarray:
    """`[H, L, L]` float32: what is added to the scores of every query (rows) with every key."""
    shared: Mapping[str, jax.Array] = scheme.position.shared(scheme.heads, param=scheme.param)
    places_BL = jnp.arange(length)[None]
    found = scheme.position.bias(dict(shared), places_BL, places_BL, scheme.heads)
    assert found is not None
    return np.asarray(found, np.float32)[0]


def by_distance(bias_HLM: np.ndarray, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distances `[N]` (query - key: positive to the left) and the bias `[H, N]` at each, of the query that sees most."""
    length = bias_HLM.shape[-1]
    query = length - 1 if causal else length // 2
    distances = query - np.arange(length)
    order = np.argsort(distances)
    return distances[order], bias_HLM[:, query][:, order]


def turning(scheme: Scheme, length: int) -> Turning:
    """Of a `Rope`, over distances 0 … length - 1 of a text of that length."""
    assert scheme.turned is not None
    frequencies = pair_frequencies(scheme.position, scheme.turned, length)
    distances = np.arange(length)
    angles_NW = distances[:, None] * frequencies
    partial_NW = np.abs(np.cumsum(np.exp(1j * angles_NW), -1))
    still = scheme.turned // 2 - len(frequencies)
    cosines_N = (np.cos(angles_NW).sum(-1) + still) / (len(frequencies) + still)
    bound_N = partial_NW.mean(-1) / partial_NW[0].mean()
    return Turning(frequencies, distances, cosines_N, bound_N)


def pair_frequencies(position: Position, size: int, length: int) -> np.ndarray:
    """`[W]` float64: radians a place of each pair that a `Rope` turns in heads of `size` channels, in a text of `length` tokens."""
    assert isinstance(position, Rope)
    turned = int(size * position.fraction) // 2 * 2
    if position.scaling is None:
        return inverse_frequencies(position.theta, turned)
    found = position.scaling.frequencies(position.theta, turned, jnp.arange(length)[None])
    return np.asarray(found, np.float64).reshape(-1)[: turned // 2]
