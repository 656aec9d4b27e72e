"""Other ways to write a model that compute the same, for families that have no word for the first: factors folded into matrices,
biases that are zero, and keys and values that are repeated where several heads share them.

A table that is scaled on the way in is stored scaled; where it was the output matrix too, that one is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.ffn import Dense, Gated
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm
from llm_jax.nn.residual import Residual, ReZero, Scaled

Leaves = Mapping[str, jax.Array]


def forms(model: Model) -> list[Model]:
    """The model as it is; with its factors folded; then also with biases of norms, networks, attention, and keys for every head."""
    plain: Any = model.mup.parametrized(model) if isinstance(model, Decoder) and model.mup else model
    found = [plain, _folded(plain)]
    if isinstance(plain, Stack):
        found.append(replace(found[-1], norm=_biased_norm(plain.norm)))
        found.append(_each(found[-1], "ffn", _biased_network))
        found.append(_each(found[-1], "attention", _biased_attention))
        found.append(_each(found[-1], "attention", _ungrouped))
    return [form for place, form in enumerate(found) if form not in found[:place]]


def rewritten(model: Any, form: Any, leaves: Leaves, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The parameters of a form, whose shapes these are, from those of the model."""
    found = dict(leaves)
    plain: Any = forms(model)[0]
    table = "embedding/embedding"
    if plain.head.tied and not form.head.tied:
        found["head/words/kernel"] = found[table].T
    if plain.embedding.scaled and not form.embedding.scaled:
        found[table] = _times(found[table], plain.final.width**0.5)
    for path in ("head/words/kernel", "head/bias"):
        if path in found and plain.head.words and plain.head.multiplier != form.head.multiplier:
            found[path] = _times(found[path], plain.head.multiplier)
    if isinstance(plain, Stack):
        for prefix, was, now in _layers(plain, form):
            found |= _scaled_queries(prefix, was, now, plain.width, found) | _repeated(prefix, was, now, found)
            found |= _scaled_branches(prefix, plain, form, found)
    return found | {path: jnp.zeros(shape) for path, shape in shapes.items() if path not in found and path.endswith("/bias")}


# ── factors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _folded(model: Any) -> Any:
    """Factors of the embedding, of the scores and of the logits in the matrices beside them."""
    head, embedding = model.head, model.embedding
    foldable = isinstance(head, LanguageModel) and (embedding.scaled or head.multiplier != 1) and not embedding.rank
    if foldable:
        model = replace(model, head=replace(head, tied=False, multiplier=1.0), embedding=replace(embedding, scaled=False))
    elif not head.tied:
        model = replace(model, embedding=replace(embedding, scaled=False))
    if not isinstance(model, Stack):
        return model
    plain = model.placement != "sandwich" and all(isinstance(layer.ffn, (Dense, Gated)) for layer in model.in_full)
    if plain and isinstance(model.residual, (Scaled, ReZero)):
        model = replace(model, residual=Residual())
    return _each(model, "attention", _unscaled)


def _unscaled(mixer: Any) -> Any:
    return replace(mixer, scale=None) if isinstance(mixer, Attention) and not mixer.qk_norm else mixer


def _layers(plain: Stack, form: Stack) -> Iterator[tuple[str, Any, Any]]:
    """Where each layer's parameters lie, those of one step of a scanned pattern together, and its mixer before and after."""
    pairs = zip(plain.in_full, form.in_full, strict=True)
    found = {"/".join(plain.place(i)): (was.attention, now.attention) for i, (was, now) in enumerate(pairs)}
    return ((prefix, *mixers) for prefix, mixers in found.items() if isinstance(mixers[0], Attention))


def _scaled_queries(prefix: str, was: Attention, now: Attention, width: int, leaves: Leaves) -> dict[str, jax.Array]:
    """Queries larger by what the scores are multiplied by."""
    if was.scale is None or was.scale == now.scale:
        return {}
    factor = was.scale * was.size(width) ** 0.5
    return {path: _times(leaf, factor) for path, leaf in leaves.items() if path.startswith(f"{prefix}/attention/query/")}


def _scaled_branches(prefix: str, plain: Stack, form: Stack, leaves: Leaves) -> dict[str, jax.Array]:
    """The last matrices of branches larger by what these are multiplied by where they join the stream."""
    if plain.residual == form.residual:
        return {}
    found: dict[str, jax.Array] = {}
    joins = {"attention": "attention/output", "ffn": "ffn/down"}
    for name, matrix in joins.items():
        join = "attention" if plain.placement.startswith("parallel") else name
        learned = leaves.get(f"{prefix}/residual_{join}/scale")  # [1], or [repeats, 1]
        for path, leaf in leaves.items():
            if path.startswith(f"{prefix}/{matrix}/"):
                factor = (2 * plain.depth) ** -0.5
                if learned is not None:
                    factor = learned.reshape(*learned.shape, *[1] * (leaf.ndim - learned.ndim))
                found[path] = _times(leaf, factor)
    return found


def _repeated(prefix: str, was: Attention, now: Attention, leaves: Leaves) -> dict[str, jax.Array]:
    """Keys and values of every head."""
    if was.groups == now.groups:
        return {}
    paths = [path for name in ("key", "value") for path in leaves if path.startswith(f"{prefix}/attention/{name}/")]
    return {path: jnp.repeat(leaves[path], now.groups // was.groups, -2) for path in paths}


def _times(leaf: jax.Array, factor: float | jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) * factor


# ── biases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _biased_network(ffn: Any) -> Any:
    return replace(ffn, bias=True) if isinstance(ffn, (Dense, Gated)) else ffn


def _biased_norm(norm: Any) -> Any:
    return replace(norm, bias=True) if isinstance(norm, LayerNorm) else norm


def _biased_attention(mixer: Any) -> Any:
    return replace(mixer, bias=True, output_bias=True) if isinstance(mixer, Attention) else mixer


def _ungrouped(mixer: Any) -> Any:
    return replace(mixer, kv_heads=None) if isinstance(mixer, Attention) else mixer


def _each(model: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """The stack with `change` done to the component of that name, in all layers."""

    def layers(kinds: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(replace(kind, **{name: change(getattr(kind, name))}) for kind in kinds)

    return replace(model, first=layers(model.first), pattern=layers(model.pattern), **{name: change(getattr(model, name))})
