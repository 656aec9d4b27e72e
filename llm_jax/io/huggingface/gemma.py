"""Gemma 2 and 3: norms around every branch, capped or normalized scores, and layers that see all between ones that see a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_jax.io.huggingface import shared
from llm_jax.io.huggingface.family import Family, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.rotary import THETA, read_rope, rope_object, rope_of, rope_scaling
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel, SequenceClassifier
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Gated
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.nn.position import Rope

WINDOW = 4096  # the default
SANDWICH = {
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_after_attention",
    "pre_feedforward_layernorm": "norm_ffn",
    "post_feedforward_layernorm": "norm_after_ffn",
}


def _gemma(fields: Fields, model: Decoder, period: int, local: Rope | None = None) -> Decoder:
    """Every `period`-th layer sees all, unless the file says otherwise; scores are divided by √query_pre_attn_scalar."""
    fields.expect("use_bidirectional_attention", None, False)
    fields.get("hidden_act", None)  # of files made before the code looked at it: hidden_activation counts, also by its default
    activation = fields.choose("hidden_activation", shared.ACTIVATIONS | {None: "gelu_tanh"}, None)
    scale = fields.get("query_pre_attn_scalar", 256) ** -0.5
    model = replace(model, attention=replace(model.attention, scale=scale), ffn=replace(model.ffn, activation=activation))
    usual = [shared.SLIDING if (i + 1) % period else shared.FULL for i in range(model.depth)]
    types = fields.get("layer_types", None) or usual
    return shared.with_windows(model, types, fields.get("sliding_window", WINDOW), local)


def _write_gemma(model: Decoder) -> dict[str, Any]:
    types, window = shared.windows(model)
    scale, activation = model.attention.scale, model.ffn.activation  # type: ignore[attr-defined]
    size = model.attention.size(model.width)  # type: ignore[attr-defined]
    scalar = size if scale is None else round(scale**-2, 6)
    name = next(name for name in (shared.NAMES.get(activation), activation) if name in shared.ACTIVATIONS)
    found = {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, "hidden_activation": name}
    # transformers wants a window, even of a model whose layers have none
    return found | {"layer_types": types, "sliding_window": window or WINDOW}


def _gemma2(fields: Fields, model: Decoder) -> Decoder:
    return _gemma(fields, shared.with_rope(fields, model), 2)


def _gemma3(fields: Fields, model: Decoder) -> Decoder:
    """Two bases: of layers that see all, and of those that slide."""
    bases = fields.get("rope_parameters", None)
    if bases is not None and shared.SLIDING in bases:
        both = fields.inside("rope_parameters")
        everywhere = rope_of(both.inside(shared.FULL), fields, theta=1_000_000.0)
        local = rope_of(both.inside(shared.SLIDING), fields, theta=THETA)
        older = Rope(theta=float(fields.get("rope_theta", everywhere.theta)), scaling=everywhere.scaling)
        if fields.get("rope_scaling", None) is not None:
            older = rope_of(fields.inside("rope_scaling"), fields, theta=older.theta)
        fields.agree("rope_theta or rope_scaling", older, everywhere)
        fields.agree("rope_local_base_freq", fields.get("rope_local_base_freq", local.theta), local.theta)
    else:
        everywhere = read_rope(fields, theta=1_000_000.0)
        local = Rope(theta=float(fields.get("rope_local_base_freq", THETA)))
    period = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    return _gemma(fields, replace(model, position=everywhere), period, local)


def _write_gemma3(model: Decoder) -> dict[str, Any]:
    found = _write_gemma(model)
    ropes = dict(zip(found["layer_types"], (layer.position for layer in model.in_full), strict=True))
    everywhere, local = (ropes.get(kind, Rope()) for kind in (shared.FULL, shared.SLIDING))
    today = {"rope_parameters": {shared.FULL: rope_object(everywhere), shared.SLIDING: rope_object(local)}}  # type: ignore[arg-type]
    return found | today | {"rope_theta": everywhere.theta, "rope_local_base_freq": local.theta} | rope_scaling(everywhere)  # type: ignore


_NORM = RMSNorm(offset=True)
_GEMMA = {"norm": _NORM, "placement": "sandwich", "embedding": Embed(scaled=True), "head": LanguageModel(tied=True)}
_GEMMA_KEYS = (
    *shared.keys(4, tied=True),
    shared.UNITS,
    shared.BIAS,
    key("head_dim", "attention.head_dim", default=256),
)
GEMMA2 = Family(
    kind="gemma2",
    preset=shared.preset(attention=Attention(head_dim=256), ffn=Gated(activation="gelu_tanh"), **_GEMMA),
    heads=shared.heads("Gemma2", tied=True),
    keys=(
        *_GEMMA_KEYS,
        key("attn_logit_softcapping", "attention.soft_cap", default=50.0),
        key("final_logit_softcapping", "head.soft_cap", default=30.0, words=True),
    ),
    rows=lambda model, values: shared.rows(SANDWICH),
    read=_gemma2,
    write=lambda model: _write_gemma(model) | shared.rope(model),
    ignored=shared.IGNORED,
    synonyms={"sliding_window_size": "sliding_window"},
)
GEMMA3 = Family(
    kind="gemma3_text",
    preset=shared.preset(attention=Attention(head_dim=256, qk_norm=_NORM), ffn=Gated(activation="gelu_tanh"), **_GEMMA),
    heads={"Gemma3ForCausalLM": LanguageModel(tied=True), "Gemma3TextForSequenceClassification": SequenceClassifier(bias=False)},
    keys=(
        *_GEMMA_KEYS,
        shared.EPSILON_OF_HEADS,
        key("attn_logit_softcapping", "attention.soft_cap", default=None),
        key("final_logit_softcapping", "head.soft_cap", default=None, words=True),
    ),
    rows=lambda model, values: shared.rows(SANDWICH),
    read=_gemma3,
    write=_write_gemma3,
    ignored=shared.IGNORED,
)
