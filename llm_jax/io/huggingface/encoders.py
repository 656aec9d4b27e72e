"""BERT, and T5 with its encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_jax.io.huggingface.family import Family, Unlike, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.names import Row
from llm_jax.io.huggingface.shared import activation
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel, SequenceClassifier, TokenClassifier
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense, Gated
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, RMSNorm
from llm_jax.nn.position import Learned, T5Bias


# ── BERT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _bert_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    layer = "bert.encoder.layer.{i}"
    pooled = isinstance(model.head, SequenceClassifier)
    return (
        Row("embedding/norm", "bert.embeddings.LayerNorm"),
        Row("embedding/types", "bert.embeddings.token_type_embeddings.weight"),
        Row("embedding", "bert.embeddings.word_embeddings"),
        Row("position", "bert.embeddings.position_embeddings"),
        *(Row(f"layers_{{i}}/attention/{name}", f"{layer}.attention.self.{name}") for name in ("query", "key", "value")),
        Row("layers_{i}/attention/output", f"{layer}.attention.output.dense"),
        Row("layers_{i}/norm_attention", f"{layer}.attention.output.LayerNorm"),
        Row("layers_{i}/ffn/up", f"{layer}.intermediate.dense"),
        Row("layers_{i}/ffn/down", f"{layer}.output.dense"),
        Row("layers_{i}/norm_ffn", f"{layer}.output.LayerNorm"),
        Row("head/transform", "bert.pooler.dense" if pooled else "cls.predictions.transform.dense"),
        Row("head/transform_norm", "cls.predictions.transform.LayerNorm"),
        Row("head/bias", "cls.predictions.bias" if model.head.tied else "cls.predictions.decoder.bias"),
        Row("head/words", "cls.predictions.decoder"),
        Row("head/labels", "classifier"),
    )


def _bert(fields: Fields, model: Encoder) -> Encoder:
    """The prediction of words has an activation of its own, which is the layers'."""
    fields.expect("position_embedding_type", "absolute")
    if isinstance(model.head, LanguageModel):
        return replace(model, head=replace(model.head, transform=model.ffn.activation))  # type: ignore[attr-defined]
    return model


BERT = Family(
    kind="bert",
    preset=Encoder(
        attention=Attention(mask=Bidirectional(), bias=True),
        ffn=Dense(bias=True),
        position=Learned(max_length=512),
        norm=LayerNorm(epsilon=1e-12),
        placement="post",
        embedding=Embed(scaled=False, norm=LayerNorm(epsilon=1e-12), types=2),
    ),
    heads={
        "BertForMaskedLM": LanguageModel(bias=True, transform="gelu"),
        "BertForPreTraining": LanguageModel(bias=True, transform="gelu"),
        "BertForSequenceClassification": SequenceClassifier(pooling="first", transform="tanh"),
        "BertForTokenClassification": TokenClassifier(),
    },
    keys=(
        key("hidden_size", "width"),
        key("num_hidden_layers", "depth"),
        key("num_attention_heads", "attention.heads"),
        key("intermediate_size", "ffn.units"),
        activation("hidden_act", "ffn.activation", "gelu"),
        key("max_position_embeddings", "position.max_length", default=512),
        key("type_vocab_size", "embedding.types", default=2),
        key("layer_norm_eps", "norm.epsilon", "embedding.norm.epsilon", default=1e-12),
        key("tie_word_embeddings", "head.tied", default=True, words=True),
    ),
    rows=_bert_rows,
    read=_bert,
    # what is there besides in files of models with other heads: the choice of the next sentence, and the vector that it looks at
    ignored=(
        r"bert\.embeddings\.position_ids",
        r"cls\.seq_relationship\..*",
        r"cls\.predictions\.(decoder\.)?bias",
        r"bert\.pooler\..*",
    ),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    unread=(
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    ),
    copies=(("cls.predictions.bias", "cls.predictions.decoder.bias"),),  # which is the former's where the matrix is tied
)


# ── T5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "output": "o"}
# feed_forward_proj → activation, and whether it gates
NETWORKS: dict[str, tuple[Any, bool]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu_tanh", True),  # the paper's code approximates, and transformers follows it here alone
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}


def _t5_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    encoder = _tower_rows("encoder", ["SelfAttention", "DenseReluDense"], model)
    decoder = _tower_rows("decoder", ["SelfAttention", "EncDecAttention", "DenseReluDense"], model)
    return (Row("embedding", "shared"), *encoder, *decoder, Row("head/words", "lm_head"))


def _tower_rows(tower: str, modules: list[str], model: Model) -> list[Row]:
    """One of the two stacks: the parts of a layer are numbered, and their norms are called alike."""
    found = [Row(f"{tower}/position", f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias")]
    found += [Row(f"{tower}/final_norm", f"{tower}.final_layer_norm")]
    for place, module in enumerate(modules):
        theirs = f"{tower}.block.{{i}}.layer.{place}"
        ours = {"SelfAttention": "attention", "EncDecAttention": "cross", "DenseReluDense": "ffn"}[module]
        found.append(Row(f"{tower}/layers_{{i}}/norm_{ours}", f"{theirs}.layer_norm"))
        gated = isinstance(model.stacks[tower].ffn, Gated)
        parts = PROJECTIONS if ours != "ffn" else {"gate": "wi_0", "up": "wi_1" if gated else "wi", "down": "wo"}
        found += [Row(f"{tower}/layers_{{i}}/{ours}/{mine}", f"{theirs}.{module}.{name}") for mine, name in parts.items()]
    return found


def _t5(fields: Fields, model: EncoderDecoder) -> EncoderDecoder:
    """Gated or not, tied or not: two choices that came together with version 1.1."""
    fields.expect("is_encoder_decoder", True)
    activation, gated = fields.choose("feed_forward_proj", NETWORKS, "relu")
    fields.expect("is_gated_act", gated)
    fields.expect("dense_act_fn", activation, {"gelu_tanh": "gelu_new"}.get(activation, activation))
    units = fields.get("d_ff")
    ffn = Gated(units=units, activation=activation) if gated else Dense(units=units, activation=activation)
    says_tied = fields.get("tie_word_embeddings", True) is not False
    # transformers 5 says "tied" of every T5, and ties those whose files have no output matrix
    tied = says_tied if fields.tensors is None else "lm_head.weight" not in fields.tensors
    scaled = fields.get("scale_decoder_outputs", says_tied)
    head = LanguageModel(tied=tied, multiplier=model.width**-0.5 if scaled else 1.0)
    depth = fields.get("num_decoder_layers", None) or model.encoder.depth
    decoder = replace(model.decoder, ffn=ffn, depth=depth)
    return replace(model, encoder=replace(model.encoder, ffn=ffn), decoder=decoder, head=head)


def _write_t5(model: EncoderDecoder) -> dict[str, Any]:
    ffn: Any = model.decoder.in_full[0].ffn
    network = (ffn.activation, isinstance(ffn, Gated))
    name = next((name for name, found in NETWORKS.items() if found == network), None)
    if name is None:
        raise Unlike(f"is {ffn!r}, which T5 has no name for", "decoder.ffn")
    head: Any = model.head
    found = {"feed_forward_proj": name, "d_ff": ffn.hidden(model.width), "num_decoder_layers": model.decoder.depth}
    found |= {"tie_word_embeddings": head.tied, "scale_decoder_outputs": head.multiplier != 1.0, "is_encoder_decoder": True}
    return found | {"decoder_start_token_id": 0}


def _tower(bidirectional: bool) -> Stack:
    """What the two stacks have in common: RMSNorm, unscaled scores, a bias by distance; nothing else has a bias."""
    attention = Attention(mask=Bidirectional(), scale=1.0) if bidirectional else Attention(scale=1.0)
    return Stack(attention=attention, ffn=Dense(activation="relu"), position=T5Bias(bidirectional=bidirectional), norm=RMSNorm())


def _both(path: str) -> tuple[str, str]:
    return f"encoder.{path}", f"decoder.{path}"


T5 = Family(
    kind="t5",
    preset=EncoderDecoder(encoder=_tower(True), decoder=_tower(False), embedding=Embed(scaled=False)),
    heads={"T5ForConditionalGeneration": LanguageModel()},
    keys=(
        key("d_model", *_both("width")),
        key("num_layers", *_both("depth")),
        key("num_heads", *_both("attention.heads")),
        key("d_kv", *_both("attention.head_dim")),
        key("layer_norm_epsilon", *_both("norm.epsilon"), default=1e-6),
        key("relative_attention_num_buckets", *_both("position.buckets"), default=32),
        key("relative_attention_max_distance", *_both("position.max_distance"), default=128),
    ),
    rows=_t5_rows,
    read=_t5,
    write=_write_t5,
    # copies of the shared table, and a bias that the first version saved and never used
    ignored=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    layers=(Gated,),
    wide={"/ffn/down/": ("float16",)},  # transformers' `_keep_in_fp32_modules`: what it sums up is too large
    synonyms={"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "head_dim": "d_kv"},
)
