"""Analytic parameters, FLOPs and memory of a model; tests hold them against the real tree and XLA's own counts."""

from __future__ import annotations

from llm_jax.models.block import layer_entries, layer_parameters
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.multihead import Attention


def parameters(model: Model, vocabulary: int) -> int:
    """Trainable scalars."""
    towers = sum(_stack_parameters(stack, cross) for stack, cross in _towers(model))
    tables = model.tables * model.embedding.parameters(model.width, vocabulary)
    return towers + tables + model.head.parameters(model.final, vocabulary)


def active_parameters(model: Model, vocabulary: int) -> int:
    """The same without the experts that a token does not visit."""
    layers = [layer for stack in model.stacks.values() for layer in stack.in_full]
    layers += model.head.layers(model.final).values()
    return parameters(model, vocabulary) - sum(layer.ffn.idle(model.width) for layer in layers if layer.ffn)


def flops_per_token(model: Model, vocabulary: int, length: int) -> float:
    """FLOPs to train on one token of a sequence of `length`; of an encoder-decoder one of the output, with as many of the input."""
    return flops_per_row(model, vocabulary, length) / length


def flops_per_row(model: Model, vocabulary: int, length: int, inputs: int | None = None) -> float:
    """FLOPs of matrix products to train on a sequence of `length`: 2 forward and 4 backward a multiply-add.

    Attention is counted over all keys, as is the custom (Chowdhery et al. 2022, appendix B), although a causal model needs half;
    recomputation under remat is not counted: these are the model's FLOPs, not the machine's. inputs: tokens that an encoder reads,
    as many unless given.
    """
    lengths = _lengths(model, length, inputs)
    total = length * _output_entries(model, vocabulary)
    for (stack, cross), own in zip(_towers(model), lengths, strict=True):
        for layer in stack.in_full:
            total += own * layer_entries(stack, layer) + own**2 * (layer.attention.scores(stack.width) if layer.attention else 0)
            if cross:  # its keys and values are the input's
                total += (lengths[0] - own) * 2 * stack.width * cross.groups * cross.size(stack.width)
                total += own * (cross.entries(stack.width) + lengths[0] * cross.scores(stack.width))
    return 6.0 * total


def _lengths(model: Model, length: int, inputs: int | None) -> list[int]:
    """The tokens that each stack reads, of which the last says something of `length`."""
    return [length if inputs is None else inputs] * (len(model.stacks) - 1) + [length]


def _towers(model: Model) -> list[tuple[Stack, Attention | None]]:
    """Each stack with the cross-attention of its layers, which the last has if any."""
    return [(stack, model.across if stack is model.final else None) for stack in model.stacks.values()]


def _stack_parameters(stack: Stack, cross: Attention | None) -> int:
    layers = sum(layer_parameters(stack, layer, cross) for layer in stack.in_full)
    final = stack.width * len(stack.norm.vectors()) if stack.placement != "post" else 0
    return layers + stack.position.parameters(stack.width, stack.heads_for_bias) + final


def _output_entries(model: Model, vocabulary: int) -> int:
    tied = model.embedding.entries(model.width, vocabulary) if model.head.tied else 0
    return model.head.entries(model.final, vocabulary) + tied
