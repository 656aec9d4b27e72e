"""What decoders have in common: heads, keys and tensors of Llama and its kin, rotary positions, and layers that see a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.io.huggingface.family import Key, Unlike, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.names import Row
from llm_jax.io.huggingface.rotary import THETA, read_rope, write_rope
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import Head, LanguageModel, SequenceClassifier, TokenClassifier
from llm_jax.models.model import Model
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


def activation(name: str, path: str, default: str = "silu") -> Key:
    """The key that names an activation."""
    return key(name, path, default=default, table=ACTIVATIONS, back=NAMES)


def heads(stem: str, tied: bool = False) -> dict[str, Head]:
    """Architecture → head, of a decoder."""
    return {
        f"{stem}ForCausalLM": LanguageModel(tied=tied),
        f"{stem}ForSequenceClassification": SequenceClassifier(bias=False),
        f"{stem}ForTokenClassification": TokenClassifier(),
    }


def keys(groups: int | None, *, epsilon: float = 1e-6, tied: bool = False) -> tuple[Key, ...]:
    """What all of these families have. groups, epsilon, tied: defaults where the file has none; None groups: as many as heads."""
    return (
        key("hidden_size", "width"),
        key("num_hidden_layers", "depth"),
        key("num_attention_heads", "attention.heads"),
        key("num_key_value_heads", "attention.kv_heads", default=groups),
        key("head_dim", "attention.head_dim", default=None, spare=True),
        key("rms_norm_eps", "norm.epsilon", default=epsilon),
        key("tie_word_embeddings", "head.tied", default=tied, words=True),
    )


UNITS, ACTIVATION = key("intermediate_size", "ffn.units"), activation("hidden_act", "ffn.activation")
ACTIVATION_OF_EXPERTS = activation("hidden_act", "ffn.expert.activation")
EPSILON_OF_HEADS = key("rms_norm_eps", "norm.epsilon", "attention.qk_norm.epsilon", default=1e-6)
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


def usual_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    """The same as a family takes them, without tensors of its own."""
    return rows()


# buffers of older versions
IGNORED = (r".*\.rotary_emb\.(inv_freq|\w+_cached)",)


def preset(**changes: Any) -> Decoder:
    """The Llama architecture, with what a family has otherwise."""
    usual = {"attention": Attention(), "ffn": Gated(), "position": Rope(), "norm": RMSNorm(), "embedding": Embed(scaled=False)}
    return Decoder(**(usual | {"head": LanguageModel(tied=False)} | changes))


def with_rope(fields: Fields, model: Decoder, theta: float = THETA) -> Decoder:
    """The model with the positions that the file describes, the same in all layers."""
    return replace(model, position=read_rope(fields, theta=theta))


def rope(model: Decoder) -> dict[str, Any]:
    """The inverse of `with_rope`."""
    return write_rope(model.in_full[0].position)  # type: ignore[arg-type]


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


def read_window(fields: Fields, model: Decoder, *, theta: float = THETA, default: int | None = None) -> Decoder:
    """Every layer slides where `sliding_window` is given."""
    window = fields.get("sliding_window", default)
    return with_windows(with_rope(fields, model, theta), [FULL if window is None else SLIDING] * model.depth, window)


def write_window(model: Decoder) -> dict[str, Any]:
    """The inverse of `read_window`."""
    return rope(model) | {"sliding_window": windows(model)[1]}
