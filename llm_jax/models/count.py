"""Analytic parameters, FLOPs and memory of a decoder; tests hold them against the real tree and XLA's own counts."""

from __future__ import annotations

from llm_jax.models.decoder import Decoder


def parameters(model: Decoder, vocabulary: int) -> int:
    """Trainable scalars."""
    per_norm = model.width * len(model.norm.vectors())
    branches = 1 + (model.ffn.branches > 0)
    norms = branches * per_norm * (2 if model.placement == "sandwich" else 1)
    layer = _layer_products(model) + _layer_biases(model) + norms + branches * model.residual.parameters()
    position = model.position.parameters(model.width, model.attention.heads)
    final = per_norm if model.placement != "post" else 0
    return model.depth * layer + position + final + vocabulary * model.width * (1 if model.tied else 2)


def _layer_products(model: Decoder) -> int:
    """Entries of a layer's matrices, each of which multiplies every token once."""
    attention, width = model.attention, model.width
    heads = 2 * attention.heads + 2 * attention.groups
    return width * heads * attention.size(width) + (model.ffn.branches + 1) * width * model.ffn.hidden(width) * (
        model.ffn.branches > 0
    )


def _layer_biases(model: Decoder) -> int:
    attention, width = model.attention, model.width
    count = (attention.heads + 2 * attention.groups) * attention.size(width) + width if attention.bias else 0
    return count + (model.ffn.branches * model.ffn.hidden(width) + width if model.ffn.branches and model.ffn.bias else 0)


def flops_per_token(model: Decoder, vocabulary: int, length: int) -> float:
    """FLOPs of matrix products to train on one token of a sequence of `length`: 2 forward and 4 backward a multiply-add.

    Attention is counted over all `length` keys, as is the custom (Chowdhery et al. 2022, appendix B), although a causal
    model needs half; recomputation under remat is not counted: these are the model's FLOPs, not the machine's.
    """
    attention = 2 * model.attention.heads * model.attention.size(model.width) * length
    return 6.0 * (model.depth * (_layer_products(model) + attention) + vocabulary * model.width)


def training_memory(model: Decoder, vocabulary: int, batch: int, length: int, slots: int) -> float:
    """Bytes at the peak of a step, estimated: parameters, gradients and `slots` float32 moments each, and what the
    backward pass keeps: with remat the layer boundaries and one layer, without it every product's operands."""
    states = 4.0 * parameters(model, vocabulary) * (2 + slots)
    tokens, size = batch * length, 2 if model.precision.compute == "bfloat16" else 4
    scores = model.attention.heads * length
    width, hidden = model.width, model.ffn.hidden(model.width) * (model.ffn.branches + 1)
    inner = (model.attention.heads + 2 * model.attention.groups) * model.attention.size(width)
    layer = size * (4 * width + inner + hidden) + 4 * 2 * scores
    kept = model.depth * size * width + layer if model.remat != "none" else model.depth * layer
    return states + tokens * (kept + 4.0 * 2 * vocabulary)
