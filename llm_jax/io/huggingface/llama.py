"""Llama and the families that grew out of it: Mistral, Qwen 2 and 3, and StableLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm_jax.io.huggingface import shared
from llm_jax.io.huggingface.family import Family, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.rotary import read_rope, write_rope
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, RMSNorm

# ── Llama ────────────────────────────────────────────────────────────────────────────────────────────────────────────
LLAMA = Family(
    kind="llama",
    preset=shared.preset(),
    heads=shared.heads("Llama"),
    keys=(*shared.keys(None), shared.UNITS, shared.ACTIVATION, shared.BIAS, key("mlp_bias", "ffn.bias", default=False)),
    rows=shared.usual_rows,
    read=shared.with_rope,
    write=shared.rope,
    ignored=shared.IGNORED,
)


# ── Mistral ──────────────────────────────────────────────────────────────────────────────────────────────────────────
MISTRAL = Family(
    kind="mistral",
    preset=shared.preset(),
    heads=shared.heads("Mistral"),
    keys=(*shared.keys(8), shared.UNITS, shared.ACTIVATION),
    rows=shared.usual_rows,
    read=lambda fields, model: shared.read_window(fields, model, default=4096),
    write=shared.write_window,
    ignored=shared.IGNORED,
)


# ── Qwen 2 and 3 ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _qwen(fields: Fields, model: Decoder) -> Decoder:
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    fields.get("sliding_window", None)
    start = fields.get("max_window_layers", 28)
    usual = [shared.SLIDING if window is not None and i >= start else shared.FULL for i in range(model.depth)]
    return shared.with_windows(shared.with_rope(fields, model), fields.get("layer_types", None) or usual, window)


def _write_qwen(model: Decoder) -> dict[str, Any]:
    types, window = shared.windows(model)
    start = next((i for i, kind in enumerate(types) if kind == shared.SLIDING), model.depth)
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": start}
    return shared.rope(model) | sliding | {"layer_types": types}


QWEN2 = Family(
    kind="qwen2",
    preset=shared.preset(attention=Attention(bias=True, output_bias=False)),
    heads=shared.heads("Qwen2"),
    keys=(*shared.keys(32), shared.UNITS, shared.ACTIVATION),
    rows=shared.usual_rows,
    read=_qwen,
    write=_write_qwen,
    ignored=shared.IGNORED,
)
QWEN3 = Family(
    kind="qwen3",
    preset=shared.preset(attention=Attention(qk_norm=RMSNorm(), head_dim=128)),
    heads=shared.heads("Qwen3"),
    keys=(
        *shared.keys(32),
        shared.UNITS,
        shared.ACTIVATION,
        shared.BIAS,
        shared.EPSILON_OF_HEADS,
        key("head_dim", "attention.head_dim", default=128),
    ),
    rows=shared.usual_rows,
    read=_qwen,
    write=_write_qwen,
    ignored=shared.IGNORED,
)


# ── StableLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _stablelm(fields: Fields, model: Decoder) -> Decoder:
    fields.expect("qk_layernorm", False)  # a norm of its own for every head
    return replace(model, position=read_rope(fields, fraction=0.25))


STABLELM = Family(
    kind="stablelm",
    preset=shared.preset(attention=Attention(output_bias=False), norm=LayerNorm()),
    heads=shared.heads("StableLm"),
    keys=(
        key("hidden_size", "width", default=2560),
        key("num_hidden_layers", "depth", default=32),
        key("num_attention_heads", "attention.heads", default=32),
        key("num_key_value_heads", "attention.kv_heads", default=32),
        key("intermediate_size", "ffn.units", default=6912),
        key("use_qkv_bias", "attention.bias", default=False),
        key("hidden_act", "ffn.activation", default="silu", table=shared.ACTIVATIONS, back=shared.NAMES),
        key("layer_norm_eps", "norm.epsilon", default=1e-5),
        key("use_parallel_residual", "placement", default=False, table={True: "parallel_shared", False: "pre"}),
        key("tie_word_embeddings", "head.tied", default=False, words=True),
    ),
    rows=shared.usual_rows,
    read=_stablelm,
    write=lambda model: write_rope(model.position, partial=True),
    ignored=shared.IGNORED,
)
