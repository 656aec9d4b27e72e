"""Llama and the families that grew out of it: Mistral, Qwen 2 and 3, Gemma 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.io.huggingface.family import Family, Unlike, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.names import Row
from llm_jax.io.huggingface.rotary import THETA, read_rope, rope_object, rope_of, write_rope
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import Head, LanguageModel, SequenceClassifier, TokenClassifier
from llm_jax.models.stack import smallest_pattern
from llm_jax.nn.activations import Activation
from llm_jax.nn.attention import Causal, SlidingWindow
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Gated
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.nn.position import Rope

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
FULL, SLIDING = "full_attention", "sliding_attention"


def heads(stem: str, tied: bool = False) -> dict[str, Head]:
    """Architecture → head, of a decoder."""
    return {
        f"{stem}ForCausalLM": LanguageModel(tied=tied),
        f"{stem}ForSequenceClassification": SequenceClassifier(bias=False),
        f"{stem}ForTokenClassification": TokenClassifier(),
    }


def keys(groups: int | None, *, epsilon: float = 1e-6, tied: bool = False, activation: bool = True) -> tuple:
    """What all of these families have. groups, epsilon, tied: defaults where the file has none; None groups: as many as heads."""
    return (
        key("hidden_size", "width"),
        key("num_hidden_layers", "depth"),
        key("num_attention_heads", "attention.heads"),
        key("num_key_value_heads", "attention.kv_heads", default=groups),
        key("head_dim", "attention.head_dim", default=None),
        key("rms_norm_eps", "norm.epsilon", default=epsilon),
        key("tie_word_embeddings", "head.tied", default=tied, words=True),
        *((key("hidden_act", "ffn.activation", default="silu", table=ACTIVATIONS, back=NAMES),) if activation else ()),
    )


UNITS = key("intermediate_size", "ffn.units")
BIAS = key("attention_bias", "attention.bias", default=False)
ATTENTION = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
}
NORMS = {"input_layernorm": "norm_attention", "post_attention_layernorm": "norm_ffn"}
SANDWICH = {
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_after_attention",
    "pre_feedforward_layernorm": "norm_ffn",
    "post_feedforward_layernorm": "norm_after_ffn",
}


def rows(norms: dict[str, str] = NORMS, more: Sequence[Row] = ()) -> tuple[Row, ...]:
    """The tensors that all of these families have, after those of a family's own."""
    layer = [Row(f"layers_{{i}}/{ours}", f"model.layers.{{i}}.{theirs}") for theirs, ours in norms.items()]
    layer += [Row(f"layers_{{i}}/attention/{ours}", f"model.layers.{{i}}.{theirs}") for theirs, ours in ATTENTION.items()]
    layer += [Row(f"layers_{{i}}/ffn/{name}", f"model.layers.{{i}}.mlp.{name}_proj") for name in ("gate", "up", "down")]
    return (
        *more,
        Row("embedding", "model.embed_tokens"),
        *layer,
        Row("final_norm", "model.norm"),
        Row("head/words", "lm_head"),
        Row("head/labels", "score"),
    )


# buffers of older versions
IGNORED = (r".*\.rotary_emb\.(inv_freq|\w+_cached)",)


def preset(**changes: Any) -> Decoder:
    """The Llama architecture, with what a family has otherwise."""
    usual = {"attention": Attention(), "ffn": Gated(), "position": Rope(), "norm": RMSNorm(), "embedding": Embed(scaled=False)}
    return Decoder(**(usual | {"head": LanguageModel(tied=False)} | changes))


# ── local and global layers ──────────────────────────────────────────────────────────────────────────────────────────
def with_layers(model: Decoder, kinds: Sequence[Layer]) -> Decoder:
    """The model with its layers described one by one."""
    first, pattern = smallest_pattern(kinds)
    return replace(model, first=first, pattern=pattern)


def with_windows(model: Decoder, types: Sequence[str], window: int | None, local: Rope | None = None) -> Decoder:
    """The model with its layers full or sliding; local: the positions of sliding layers, where they have their own."""
    if set(types) - {FULL, SLIDING} or len(types) != model.depth:
        raise ConfigError(f"must be {FULL} or {SLIDING} for each of {model.depth} layers, got {types}", "layer_types")
    if SLIDING not in types:
        return model
    if window is None:
        raise ConfigError("must be a number of tokens where layers slide, got None", "sliding_window")
    sliding = Layer(attention=replace(model.attention, mask=SlidingWindow(window)), position=local)
    if FULL not in types:
        return replace(model, attention=sliding.attention, position=local or model.position)
    return with_layers(model, [sliding if kind == SLIDING else Layer() for kind in types])


def windows(model: Decoder) -> tuple[list[str], int | None]:
    """The inverse: each layer's type, and the window."""
    masks = [layer.attention.mask for layer in model.in_full]  # type: ignore[union-attr]
    sizes = {mask.window for mask in masks if isinstance(mask, SlidingWindow)}
    if len(sizes) > 1 or any(mask not in (Causal(), SlidingWindow(max(sizes, default=1))) for mask in masks):
        raise Unlike(f"is {masks!r}, and transformers has causal layers and one size of window", "attention.mask")
    return [SLIDING if isinstance(mask, SlidingWindow) else FULL for mask in masks], max(sizes, default=None)


# ── Llama ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _with_rope(fields: Fields, model: Decoder, theta: float = THETA) -> Decoder:
    return replace(model, position=read_rope(fields, theta=theta))


def _rope(model: Decoder) -> dict[str, Any]:
    return write_rope(model.in_full[0].position)  # type: ignore[arg-type]


LLAMA = Family(
    "llama",
    preset(),
    heads("Llama"),
    (*keys(None), UNITS, BIAS, key("mlp_bias", "ffn.bias", default=False)),
    lambda model, values: rows(),
    _with_rope,
    _rope,
    IGNORED,
)


# ── Mistral ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_window(fields: Fields, model: Decoder, theta: float = THETA) -> Decoder:
    """Every layer slides where `sliding_window` is given."""
    window = fields.get("sliding_window", None)
    return with_windows(_with_rope(fields, model, theta), [FULL if window is None else SLIDING] * model.depth, window)


def write_window(model: Decoder) -> dict[str, Any]:
    """The inverse of `read_window`."""
    return _rope(model) | {"sliding_window": windows(model)[1]}


def _mistral(fields: Fields, model: Decoder) -> Decoder:
    fields.get("sliding_window", 4096)
    fields.values.setdefault("sliding_window", 4096)  # what transformers takes where the key is absent
    return read_window(fields, model)


MISTRAL = Family(
    "mistral", preset(), heads("Mistral"), (*keys(8), UNITS), lambda model, values: rows(), _mistral, write_window, IGNORED
)


# ── Qwen 2 and 3 ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _qwen(fields: Fields, model: Decoder) -> Decoder:
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    fields.get("sliding_window", None)
    start = fields.get("max_window_layers", 28)
    usual = [SLIDING if window is not None and i >= start else FULL for i in range(model.depth)]
    return with_windows(_with_rope(fields, model), fields.get("layer_types", None) or usual, window)


def _write_qwen(model: Decoder) -> dict[str, Any]:
    types, window = windows(model)
    start = next((i for i, kind in enumerate(types) if kind == SLIDING), model.depth)
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": start}
    return _rope(model) | sliding | {"layer_types": types}


QWEN2 = Family(
    "qwen2",
    preset(attention=Attention(bias=True, output_bias=False)),
    heads("Qwen2"),
    (*keys(32), UNITS),
    lambda model, values: rows(),
    _qwen,
    _write_qwen,
    IGNORED,
)
EPSILON_OF_HEADS = key("rms_norm_eps", "norm.epsilon", "attention.qk_norm.epsilon", default=1e-6)
QWEN3 = Family(
    "qwen3",
    preset(attention=Attention(qk_norm=RMSNorm(), head_dim=128)),
    heads("Qwen3"),
    (*keys(32), UNITS, BIAS, EPSILON_OF_HEADS, key("head_dim", "attention.head_dim", default=128)),
    lambda model, values: rows(),
    _qwen,
    _write_qwen,
    IGNORED,
)


# ── Gemma 2 and 3 ────────────────────────────────────────────────────────────────────────────────────────────────────
def _gemma(fields: Fields, model: Decoder, period: int, local: Rope | None = None) -> Decoder:
    """Every `period`-th layer sees all, unless the file says otherwise; scores are divided by √query_pre_attn_scalar."""
    fields.expect("use_bidirectional_attention", None, False)
    fields.get("hidden_act", None)  # of files made before the code looked at it: hidden_activation counts, also by its default
    activation = fields.choose("hidden_activation", ACTIVATIONS | {None: "gelu_tanh"}, None)
    scale = fields.get("query_pre_attn_scalar", 256) ** -0.5
    model = replace(model, attention=replace(model.attention, scale=scale), ffn=replace(model.ffn, activation=activation))
    usual = [SLIDING if (i + 1) % period else FULL for i in range(model.depth)]
    types = fields.get("layer_types", None) or usual
    return with_windows(model, types, fields.get("sliding_window", 4096), local)


def _write_gemma(model: Decoder) -> dict[str, Any]:
    types, window = windows(model)
    scale, activation = model.attention.scale, model.ffn.activation  # type: ignore[attr-defined]
    size = model.attention.size(model.width)  # type: ignore[attr-defined]
    scalar = size if scale is None else round(scale**-2, 6)
    name = next(name for name in (NAMES.get(activation), activation) if name in ACTIVATIONS)
    found = {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, "hidden_activation": name}
    return found | {"layer_types": types, "sliding_window": window}


def _gemma2(fields: Fields, model: Decoder) -> Decoder:
    return _gemma(fields, _with_rope(fields, model), 2)


def _gemma3(fields: Fields, model: Decoder) -> Decoder:
    """Two bases: of layers that see all, and of those that slide."""
    bases = fields.get("rope_parameters", None)
    if bases is not None and SLIDING in bases:
        both = fields.inside("rope_parameters")
        everywhere = rope_of(both.inside(FULL), fields, theta=1_000_000.0)
        local = rope_of(both.inside(SLIDING), fields, theta=THETA)
    else:
        everywhere = read_rope(fields, theta=1_000_000.0)
        local = Rope(theta=float(fields.get("rope_local_base_freq", THETA)))
    period = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    return _gemma(fields, replace(model, position=everywhere), period, local)


def _write_gemma3(model: Decoder) -> dict[str, Any]:
    found = _write_gemma(model)
    ropes = dict(zip(found["layer_types"], (layer.position for layer in model.in_full), strict=True))
    bases = {kind: rope_object(ropes.get(kind, Rope())) for kind in (FULL, SLIDING)}  # type: ignore[arg-type]
    return found | {"rope_parameters": bases}


_NORM = RMSNorm(offset=True)
_GEMMA = {"norm": _NORM, "placement": "sandwich", "embedding": Embed(scaled=True), "head": LanguageModel(tied=True)}
_GEMMA_KEYS = (
    *keys(4, tied=True, activation=False),
    UNITS,
    BIAS,
    key("head_dim", "attention.head_dim", default=256),
)
GEMMA2 = Family(
    "gemma2",
    preset(attention=Attention(head_dim=256), ffn=Gated(activation="gelu_tanh"), **_GEMMA),
    heads("Gemma2", tied=True),
    (
        *_GEMMA_KEYS,
        key("attn_logit_softcapping", "attention.soft_cap", default=50.0),
        key("final_logit_softcapping", "head.soft_cap", default=30.0, words=True),
    ),
    lambda model, values: rows(SANDWICH),
    _gemma2,
    lambda model: _write_gemma(model) | _rope(model),
    IGNORED,
)
GEMMA3 = Family(
    "gemma3_text",
    preset(attention=Attention(head_dim=256, qk_norm=_NORM), ffn=Gated(activation="gelu_tanh"), **_GEMMA),
    {"Gemma3ForCausalLM": LanguageModel(tied=True), "Gemma3TextForSequenceClassification": SequenceClassifier(bias=False)},
    (
        *_GEMMA_KEYS,
        EPSILON_OF_HEADS,
        key("attn_logit_softcapping", "attention.soft_cap", default=None),
        key("final_logit_softcapping", "head.soft_cap", default=None, words=True),
    ),
    lambda model, values: rows(SANDWICH),
    _gemma3,
    _write_gemma3,
    IGNORED,
)
