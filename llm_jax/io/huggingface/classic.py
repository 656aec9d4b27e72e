"""GPT-2, GPT-NeoX (Pythia) and BLOOM: LayerNorm, plain feed-forward networks, and queries, keys and values in one matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llm_jax.io.huggingface.family import Family, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.layouts import flat, part, transposed
from llm_jax.io.huggingface.names import Row
from llm_jax.io.huggingface.rotary import read_rope, write_rope
from llm_jax.io.huggingface.shared import activation, heads, with_layers
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel, SequenceClassifier
from llm_jax.models.model import Model
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm
from llm_jax.nn.position import Alibi, Learned, Rope

PLAIN = Embed(scaled=False)


def fused(prefix: str, matrix: Callable, axis: int, before: int) -> list[Row]:
    """Queries, keys and values that stand in one matrix: one after another, or (before=1) head by head."""
    return [
        Row(
            f"layers_{{i}}/attention/{name}",
            prefix,
            {"kernel": part(matrix, axis, place, 3, before), "bias": part(flat(0), 0, place, 3, before)},
        )
        for place, name in enumerate(("query", "key", "value"))
    ]


def labels(model: Model) -> Row:
    """The classifier, which is called otherwise where it scores tokens."""
    return Row("head/labels", "score" if isinstance(model.head, SequenceClassifier) else "classifier")


# ── GPT-2 ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _gpt2_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    layer, untransposed = "transformer.h.{i}", {"kernel": flat(1)}  # GPT-2's matrices are [inputs, outputs]
    return (
        Row("embedding", "transformer.wte"),
        Row("position", "transformer.wpe"),
        Row("layers_{i}/norm_attention", f"{layer}.ln_1"),
        *fused(f"{layer}.attn.c_attn", flat(1), 1, 0),
        Row("layers_{i}/attention/output", f"{layer}.attn.c_proj", {"kernel": flat(2)}),
        Row("layers_{i}/norm_ffn", f"{layer}.ln_2"),
        Row("layers_{i}/ffn/up", f"{layer}.mlp.c_fc", untransposed),
        Row("layers_{i}/ffn/down", f"{layer}.mlp.c_proj", untransposed),
        Row("final_norm", "transformer.ln_f"),
        Row("head/words", "lm_head"),
        labels(model),
    )


def _gpt2(fields: Fields, model: Decoder) -> Decoder:
    """Hidden units, four times the width by default, and the scale of scores: of none, 1/√head_dim, or also 1/(layer + 1)."""
    units = fields.get("n_inner", None) or 4 * model.width
    model = replace(model, ffn=replace(model.ffn, units=units))
    scale = 1.0 if not fields.get("scale_attn_weights", True) else None
    if not fields.get("scale_attn_by_inverse_layer_idx", False):
        return replace(model, attention=replace(model.attention, scale=scale))
    return with_layers(model, [Layer(attention=_scaled(model, i, scale)) for i in range(model.depth)])


def _scaled(model: Decoder, index: int, scale: float | None) -> Attention:
    attention: Any = model.attention
    return replace(attention, scale=(scale or attention.size(model.width) ** -0.5) / (index + 1))


def _write_gpt2(model: Decoder) -> dict[str, Any]:
    attentions: list[Any] = [layer.attention for layer in model.in_full]
    plain = attentions[0].size(model.width) ** -0.5
    first, last = (attentions[i].scale or plain for i in (0, -1))
    found = {"scale_attn_weights": first != 1.0, "scale_attn_by_inverse_layer_idx": first != last}
    return found | {"n_inner": model.in_full[0].ffn.hidden(model.width)}  # type: ignore[union-attr]


GPT2 = Family(
    kind="gpt2",
    preset=Decoder(attention=Attention(bias=True), ffn=Dense(bias=True), position=Learned(), norm=LayerNorm(), embedding=PLAIN),
    heads={"GPT2LMHeadModel": LanguageModel()} | {name: head for name, head in heads("GPT2").items() if "Classification" in name},
    keys=(
        key("n_embd", "width"),
        key("n_layer", "depth"),
        key("n_head", "attention.heads"),
        key("n_positions", "position.max_length", default=1024),
        activation("activation_function", "ffn.activation", "gelu_new"),
        key("layer_norm_epsilon", "norm.epsilon", default=1e-5),
        key("tie_word_embeddings", "head.tied", default=True, words=True),
    ),
    rows=_gpt2_rows,
    read=_gpt2,
    write=_write_gpt2,
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask
    renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),  # files of the model without a head
    synonyms={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
)


# ── GPT-NeoX ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _neox_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    layer = "gpt_neox.layers.{i}"
    return (
        Row("embedding", "gpt_neox.embed_in"),
        Row("layers_{i}/norm_attention", f"{layer}.input_layernorm"),
        *fused(f"{layer}.attention.query_key_value", transposed(1), 0, 1),
        Row("layers_{i}/attention/output", f"{layer}.attention.dense"),
        Row("layers_{i}/norm_ffn", f"{layer}.post_attention_layernorm"),
        Row("layers_{i}/ffn/up", f"{layer}.mlp.dense_h_to_4h"),
        Row("layers_{i}/ffn/down", f"{layer}.mlp.dense_4h_to_h"),
        Row("final_norm", "gpt_neox.final_layer_norm"),
        Row("head/words", "embed_out"),
        labels(model),
    )


def _neox(fields: Fields, model: Decoder) -> Decoder:
    return replace(model, position=read_rope(fields, fraction=0.25))


def _write_neox(model: Any) -> dict[str, Any]:
    """With the older names of the base and the part."""
    found = write_rope(model.position, partial=True)
    return found | {"rotary_pct": found.pop("partial_rotary_factor"), "rotary_emb_base": found.pop("rope_theta")}


NEOX = Family(
    kind="gpt_neox",
    preset=Decoder(
        attention=Attention(bias=True),
        ffn=Dense(bias=True),
        position=Rope(),
        norm=LayerNorm(),
        placement="parallel",
        embedding=PLAIN,
    ),
    heads=heads("GPTNeoX"),
    keys=(
        key("hidden_size", "width"),
        key("num_hidden_layers", "depth"),
        key("num_attention_heads", "attention.heads"),
        key("intermediate_size", "ffn.units"),
        activation("hidden_act", "ffn.activation", "gelu"),
        key("layer_norm_eps", "norm.epsilon", default=1e-5),
        key("attention_bias", "attention.bias", default=True),
        key("use_parallel_residual", "placement", default=True, table={True: "parallel", False: "pre"}),
        key("tie_word_embeddings", "head.tied", default=False, words=True),
    ),
    rows=_neox_rows,
    read=_neox,
    write=_write_neox,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.\w+)",),
    renames=((r"^lm_head\.", "embed_out."),),
)


# ── BLOOM ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _bloom_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    layer = "transformer.h.{i}"
    return (
        Row("embedding/norm", "transformer.word_embeddings_layernorm"),
        Row("embedding", "transformer.word_embeddings"),
        Row("layers_{i}/norm_attention", f"{layer}.input_layernorm"),
        *fused(f"{layer}.self_attention.query_key_value", transposed(1), 0, 1),
        Row("layers_{i}/attention/output", f"{layer}.self_attention.dense"),
        Row("layers_{i}/norm_ffn", f"{layer}.post_attention_layernorm"),
        Row("layers_{i}/ffn/up", f"{layer}.mlp.dense_h_to_4h"),
        Row("layers_{i}/ffn/down", f"{layer}.mlp.dense_4h_to_h"),
        Row("final_norm", "transformer.ln_f"),
        Row("head/words", "lm_head"),
        labels(model),
    )


def _bloom(fields: Fields, model: Decoder) -> Decoder:
    """Four times as many hidden units as channels; the residual leaves before the norm."""
    fields.expect("apply_residual_connection_post_layernorm", False)
    return replace(model, ffn=replace(model.ffn, units=4 * model.width))


BLOOM = Family(
    kind="bloom",
    preset=Decoder(
        attention=Attention(bias=True),
        ffn=Dense(activation="gelu_tanh", bias=True),
        position=Alibi(),
        norm=LayerNorm(),
        embedding=Embed(scaled=False, norm=LayerNorm()),
    ),
    heads=heads("Bloom", tied=True),
    keys=(
        key("hidden_size", "width"),
        key("n_layer", "depth"),
        key("n_head", "attention.heads"),
        key("layer_norm_epsilon", "norm.epsilon", "embedding.norm.epsilon", default=1e-5),
        key("tie_word_embeddings", "head.tied", default=True, words=True),
    ),
    rows=_bloom_rows,
    read=_bloom,
    renames=((r"^(?=(word_embeddings|word_embeddings_layernorm|h|ln_f)\.)", "transformer."),),
    synonyms={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    unread=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "n_inner",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "unk_token_id",
    ),
)
