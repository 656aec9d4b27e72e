"""Mixtral, Qwen 3 MoE and DeepSeek-V3: layers of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_jax.io.huggingface import shared
from llm_jax.io.huggingface.family import Family, key
from llm_jax.io.huggingface.fields import Fields
from llm_jax.io.huggingface.layouts import Layout, shuffled, transposed
from llm_jax.io.huggingface.names import Arrange, Row
from llm_jax.io.huggingface.rotary import read_rope, write_rope
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.model import Model
from llm_jax.nn.ffn import Gated
from llm_jax.nn.latent import MLA
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.nn.routing import Sigmoid


def expert_rows(module: str, gate: str, up: str, down: str) -> list[Row]:
    """Experts one by one, as files have them, or together, as the code of transformers 5 keeps them."""

    def one(name: str, theirs: str, together: Arrange, tensor: str) -> Row:
        instead = Row(f"layers_{{i}}/ffn/experts/{name}/kernel", f"model.layers.{{i}}.mlp.experts.{tensor}", {"kernel": together})
        return Row(f"layers_{{i}}/ffn/experts/{name}", f"model.layers.{{i}}.{module}.experts.{{e}}.{theirs}", instead=instead)

    return [
        one("gate", gate, lambda shape: _both(shape, 0), "gate_up_proj"),
        one("up", up, lambda shape: _both(shape, 1), "gate_up_proj"),
        one("down", down, lambda shape: Layout(((shape[0],), (shape[2],), (shape[1],)), (0, 2, 1)), "down_proj"),
    ]


def _both(shape: tuple[int, ...], place: int) -> Layout:
    """Ours `[E, D, F]` in `[E, 2F, D]`: gates first, then what they multiply."""
    experts, width, units = shape
    return Layout(((experts,), (2, units), (width,)), (0, 3, 2), {1: place})


# ── Mixtral ──────────────────────────────────────────────────────────────────────────────────────────────────────────
MIXTRAL = Family(
    kind="mixtral",
    preset=shared.preset(ffn=MoE(), norm=RMSNorm(epsilon=1e-5)),
    heads=shared.heads("Mixtral"),
    keys=(
        *shared.keys(8, epsilon=1e-5),
        shared.ACTIVATION_OF_EXPERTS,
        key("intermediate_size", "ffn.expert.units"),
        key("num_local_experts", "ffn.experts", default=8),
        key("num_experts_per_tok", "ffn.active", default=2),
    ),
    rows=lambda model, values: shared.rows(
        more=[
            Row("layers_{i}/ffn/router", "model.layers.{i}.block_sparse_moe.gate"),
            *expert_rows("block_sparse_moe", "w1", "w3", "w2"),
        ]
    ),
    read=lambda fields, model: shared.read_window(fields, model, theta=1_000_000.0),
    write=shared.write_window,
    ignored=shared.IGNORED,
    renames=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
    synonyms={"num_experts": "num_local_experts"},
)


# ── Qwen 3 MoE ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _qwen(fields: Fields, model: Decoder) -> Decoder:
    """Every `decoder_sparse_step`-th layer has experts, but those named in `mlp_only_layers`; with a window all layers slide."""
    moe: Any = model.ffn
    model = replace(model, position=read_rope(fields))
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    fields.get("sliding_window", None)
    model = shared.with_windows(model, ["full_attention" if window is None else "sliding_attention"] * model.depth, window)
    dense = Layer(ffn=Gated(units=fields.get("intermediate_size", 6144), activation=moe.expert.activation))
    step, plain = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers", None) or ()
    return shared.with_layers(model, [dense if i in plain or (i + 1) % step else Layer() for i in range(model.depth)])


def _write_qwen(model: Decoder) -> dict[str, Any]:
    window = shared.windows(model)[1]
    dense = {i: layer.ffn for i, layer in enumerate(model.in_full) if isinstance(layer.ffn, Gated)}
    units = max((ffn.hidden(model.width) for ffn in dense.values()), default=model.ffn.expert.hidden(model.width))  # type: ignore[attr-defined]
    sparse = {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}
    sliding = {"use_sliding_window": window is not None, "sliding_window": window}
    return write_rope(model.in_full[0].position) | sparse | sliding | {"intermediate_size": units}  # type: ignore[arg-type]


QWEN3_MOE = Family(
    kind="qwen3_moe",
    preset=shared.preset(attention=Attention(qk_norm=RMSNorm()), ffn=MoE()),
    heads=shared.heads("Qwen3Moe"),
    keys=(
        *shared.keys(4),
        shared.ACTIVATION_OF_EXPERTS,
        shared.EPSILON_OF_HEADS,
        shared.BIAS,
        key("moe_intermediate_size", "ffn.expert.units", default=768),
        key("num_experts", "ffn.experts", default=128),
        key("num_experts_per_tok", "ffn.active", default=8),
        key("norm_topk_prob", "ffn.router.renormalize", default=False),
    ),
    rows=lambda model, values: shared.rows(
        more=[Row("layers_{i}/ffn/router", "model.layers.{i}.mlp.gate"), *expert_rows("mlp", "gate_proj", "up_proj", "down_proj")]
    ),
    read=_qwen,
    write=_write_qwen,
    ignored=shared.IGNORED,
    layers=(Gated,),
    synonyms={"num_local_experts": "num_experts"},  # which versions from 5 on write
    unread=("max_window_layers",),
)


# ── DeepSeek-V3 ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _deepseek_rows(model: Model, values: Mapping[str, Any]) -> tuple[Row, ...]:
    mla: Any = model.final.attention
    attention, paired = "model.layers.{i}.self_attn", values.get("rope_interleave", True)

    def turned(name: str, theirs: str, factor: int) -> Row:
        """A matrix whose last `rope_dim` outputs of each group may stand in pairs on disk, and stand in halves here."""
        if not paired:
            return Row(f"layers_{{i}}/attention/{name}", f"{attention}.{theirs}")
        mixed = shuffled(transposed(1), factor, lambda size: _halves(size, mla.rope_dim))
        bias = shuffled(lambda shape: Layout((shape,), tuple(range(len(shape)))), factor, lambda size: _halves(size, mla.rope_dim))
        return Row(f"layers_{{i}}/attention/{name}", f"{attention}.{theirs}", {"kernel": mixed, "bias": bias})

    return shared.rows(
        more=[
            turned("query", "q_proj", 1),
            Row("layers_{i}/attention/query_down", f"{attention}.q_a_proj"),
            Row("layers_{i}/attention/query_norm", f"{attention}.q_a_layernorm"),
            turned("query_up", "q_b_proj", 1),
            turned("kv_down", "kv_a_proj_with_mqa", 0),
            Row("layers_{i}/attention/kv_norm", f"{attention}.kv_a_layernorm"),
            Row("layers_{i}/attention/kv_up", f"{attention}.kv_b_proj"),
            Row("layers_{i}/ffn/router/bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
            Row("layers_{i}/ffn/router", "model.layers.{i}.mlp.gate"),
            *expert_rows("mlp", "gate_proj", "up_proj", "down_proj"),
            *(
                Row(f"layers_{{i}}/ffn/shared/{n}", f"model.layers.{{i}}.mlp.shared_experts.{n}_proj")
                for n in ("gate", "up", "down")
            ),
        ]
    )


def _halves(size: int, turned: int) -> tuple[int, ...]:
    """Where each of our outputs stands on disk: unturned ones where they are, then all firsts of pairs, then all seconds."""
    plain = size - turned
    return (*range(plain), *range(plain, size, 2), *range(plain + 1, size, 2))


def _deepseek(fields: Fields, model: Decoder) -> Decoder:
    """The first layers are dense; the shared experts are one network of their units together."""
    fields.expect("head_dim", model.attention.rope_dim)  # type: ignore[attr-defined]
    fields.expect("qk_head_dim", model.attention.rope_dim + model.attention.nope_dim)  # type: ignore[attr-defined]
    fields.expect("num_key_value_heads", model.attention.heads, None)  # type: ignore[attr-defined]
    fields.expect("moe_layer_freq", 1)
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "sigmoid")
    fields.get("rope_interleave", True)  # how the matrices lie on disk: see the rows
    moe: Any = model.ffn
    together = Gated(units=fields.get("n_shared_experts", 1) * moe.expert.units, activation=moe.expert.activation)
    model = replace(model, ffn=replace(moe, shared=together), position=read_rope(fields))
    dense = Layer(ffn=Gated(units=fields.get("intermediate_size"), activation=moe.expert.activation))
    start = min(fields.get("first_k_dense_replace", 3), model.depth)
    return shared.with_layers(model, [dense] * start + [Layer()] * (model.depth - start))


def _write_deepseek(model: Decoder) -> dict[str, Any]:
    moe: Any = model.ffn
    dense = [layer.ffn for layer in model.in_full if isinstance(layer.ffn, Gated)]
    units = moe.expert.hidden(model.width)
    together = (moe.shared.hidden(model.width) if moe.shared else 0) // units
    found = {"n_shared_experts": together, "first_k_dense_replace": len(dense), "num_nextn_predict_layers": 0}
    found |= {"intermediate_size": dense[0].hidden(model.width) if dense else units, "rope_interleave": True}
    return write_rope(model.position) | found | {"num_key_value_heads": model.attention.heads}  # type: ignore[arg-type,attr-defined]


DEEPSEEK_V3 = Family(
    kind="deepseek_v3",
    preset=shared.preset(attention=MLA(), ffn=MoE(router=Sigmoid(bias=True))),
    heads=shared.heads("DeepseekV3"),
    keys=(
        key("hidden_size", "width"),
        key("num_hidden_layers", "depth"),
        key("rms_norm_eps", "norm.epsilon", default=1e-6),
        key("tie_word_embeddings", "head.tied", default=False, words=True),
        key("num_attention_heads", "attention.heads"),
        key("q_lora_rank", "attention.q_rank", default=1536),
        key("kv_lora_rank", "attention.kv_rank", default=512),
        key("qk_nope_head_dim", "attention.nope_dim", default=128),
        key("qk_rope_head_dim", "attention.rope_dim", default=64),
        key("v_head_dim", "attention.value_dim", default=128),
        shared.BIAS,
        shared.ACTIVATION_OF_EXPERTS,
        key("moe_intermediate_size", "ffn.expert.units", default=2048),
        key("n_routed_experts", "ffn.experts", default=256),
        key("num_experts_per_tok", "ffn.active", default=8),
        key("n_group", "ffn.router.groups", default=8),
        key("topk_group", "ffn.router.active_groups", default=4),
        key("norm_topk_prob", "ffn.router.renormalize", default=True),
        key("routed_scaling_factor", "ffn.router.scale", default=2.5),
    ),
    rows=_deepseek_rows,
    read=_deepseek,
    write=_write_deepseek,
    ignored=(*shared.IGNORED, r"model\.layers\.{depth}\..*"),  # the layer that predicts further tokens
    layers=(Gated,),
    synonyms={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    unread=("num_nextn_predict_layers",),  # predicts further tokens; the next one does not depend on it
    # transformers' `_keep_in_fp32_modules_strict`: experts are chosen by small differences
    wide={"/ffn/router/": ("bfloat16", "float16")},
)
