"""Other ways to write a model that compute the same, for families that have no word for the first: factors folded into matrices,
and biases that are zero.

A table that is scaled on the way in is stored scaled; where it was the output matrix too, that one is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

Leaves = Mapping[str, jax.Array]


def forms(model: Model) -> list[Model]:
    """The model as it is, then with its factors folded, then with biases of norms, also of networks, and also of attention."""
    plain: Any = model.mup.parametrized(model) if isinstance(model, Decoder) and model.mup else model
    found = [plain, _folded(plain)]
    if isinstance(plain, Stack):
        found.append(replace(found[-1], norm=_biased_norm(plain.norm)))
        found.append(_each(found[-1], "ffn", _biased_network))
        found.append(_each(found[-1], "attention", _biased_attention))
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
        _turn_scales(plain, form, found)
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
    return _each(model, "attention", _unscaled) if isinstance(model, Stack) else model


def _unscaled(mixer: Any) -> Any:
    return replace(mixer, scale=None) if isinstance(mixer, Attention) and not mixer.qk_norm else mixer


def _turn_scales(plain: Stack, form: Stack, leaves: dict[str, jax.Array]) -> None:
    """Queries larger by what the scores are multiplied by, for each layer."""
    for index, (was, now) in enumerate(zip(plain.in_full, form.in_full, strict=True)):
        scale, turned = (getattr(layer.attention, "scale", None) for layer in (was, now))
        if scale is None or scale == turned:
            continue
        factor = scale * was.attention.size(plain.width) ** 0.5  # type: ignore[union-attr]
        place = "/".join(plain.place(index))
        at = (index - len(plain.first)) // plain.period if place.startswith("layers/") else ...
        for path in [path for path in leaves if path.startswith(f"{place}/attention/query/")]:
            leaves[path] = jnp.asarray(leaves[path]).at[at].multiply(factor)


def _times(leaf: jax.Array, factor: float) -> jax.Array:
    return leaf.astype(jnp.float32) * factor


# ── biases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _biased_network(ffn: Any) -> Any:
    return replace(ffn, bias=True) if isinstance(ffn, (Dense, Gated)) else ffn


def _biased_norm(norm: Any) -> Any:
    return replace(norm, bias=True) if isinstance(norm, LayerNorm) else norm


def _biased_attention(mixer: Any) -> Any:
    return replace(mixer, bias=True, output_bias=True) if isinstance(mixer, Attention) else mixer


def _each(model: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """The stack with `change` done to the component of that name, in all layers."""

    def layers(kinds: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(replace(kind, **{name: change(getattr(kind, name))}) for kind in kinds)

    return replace(model, first=layers(model.first), pattern=layers(model.pattern), **{name: change(getattr(model, name))})
