"""Whether the axes of a mesh divide what they are to split of a model: heads, hidden units, experts, layers, rows' tokens."""

from __future__ import annotations

from collections.abc import Mapping

from llm_jax.core.config import ConfigError
from llm_jax.models.block import Layer
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.moe import MoE


def check_split(model: Model, axes: Mapping[str, int], *, length: int) -> None:
    """Raises `ConfigError` where one of the `axes` (name → devices) does not divide what it splits. length: tokens of a row."""
    _divides(axes, "sequence", length, "data.sequence_length")
    for path, stack in model.stacks.items():
        at = f"model.{path}." if path else "model."
        for where, layer in stack.described.items():
            _check_layer(axes, f"{at}{where}", stack, stack.resolved(layer))
        if axes["stage"] > 1:
            _check_stages(axes, at, stack)


def _check_layer(axes: Mapping[str, int], at: str, stack: Stack, layer: Layer) -> None:
    if layer.attention and layer.attention.attends:
        _divides(axes, "tensor", layer.attention.heads_for_bias, f"{at}attention.heads")
    if isinstance(layer.ffn, MoE):
        _divides(axes, "expert", layer.ffn.experts, f"{at}ffn.experts")
        _divides(axes, "tensor", layer.ffn.expert.hidden(stack.width), f"{at}ffn.expert.units")
    elif layer.ffn:
        _divides(axes, "tensor", layer.ffn.hidden(stack.width), f"{at}ffn.units")


def _check_stages(axes: Mapping[str, int], at: str, stack: Stack) -> None:
    if not stack.scanned:
        raise ConfigError(f"must be 'scanned' to be split over mesh.stage={axes['stage']}, got {stack.layers!r}", f"{at}layers")
    _divides(axes, "stage", stack.repeats, f"{at}depth, in layers after `first` and periods of `pattern`,")


def _divides(axes: Mapping[str, int], axis: str, size: int, what: str) -> None:
    parts = axes[axis]
    if size % parts:
        nearest = [n for n in range(1, parts + 1) if size % n == 0][-1]
        fitting = max(parts * round(size / parts), parts)
        raise ConfigError(f"must be a multiple of mesh.{axis}={parts}, got {size}: take {fitting}, or mesh.{axis}={nearest}", what)
