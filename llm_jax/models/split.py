"""Whether the axes of a mesh divide what they are to split of a model: heads, hidden units, experts, layers, rows' tokens."""

from __future__ import annotations

from collections.abc import Mapping

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.models.block import Layer
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.moe import MoE


def check_split(model: Model, mesh: Mesh, *, length: int) -> None:
    """Raises `ConfigError` where an axis of the mesh does not divide what it splits. length: tokens of a row."""
    axes = mesh.sizes
    _divides(axes["sequence"], "mesh.sequence", length, "data.sequence_length")
    for path, stack in model.stacks.items():
        at = f"model.{path}." if path else "model."
        for where, layer in stack.described.items():
            _check_layer(axes, f"{at}{where}", stack, stack.resolved(layer))
        if axes["stage"] > 1:
            _check_stages(axes, mesh.rounds, at, stack)


def _check_layer(axes: Mapping[str, int], at: str, stack: Stack, layer: Layer) -> None:
    if layer.attention and layer.attention.attends:
        _divides(axes["tensor"], "mesh.tensor", layer.attention.heads_for_bias, f"{at}attention.heads")
    if isinstance(layer.ffn, MoE):
        _divides(axes["expert"], "mesh.expert", layer.ffn.experts, f"{at}ffn.experts")
        _divides(axes["tensor"], "mesh.tensor", layer.ffn.expert.hidden(stack.width), f"{at}ffn.expert.units")
    elif layer.ffn:
        _divides(axes["tensor"], "mesh.tensor", layer.ffn.hidden(stack.width), f"{at}ffn.units")


def _check_stages(axes: Mapping[str, int], rounds: int, at: str, stack: Stack) -> None:
    if not stack.scanned:
        raise ConfigError(f"must be 'scanned' to be split over mesh.stage={axes['stage']}, got {stack.layers!r}", f"{at}layers")
    what = f"{at}depth" if stack.repeats == stack.depth else f"{at}depth, in periods of `pattern` after `first`,"
    wanted = "mesh.stage" if rounds == 1 else "mesh.stage × mesh.rounds"
    _divides(axes["stage"] * rounds, wanted, stack.repeats, what)


def _divides(parts: int, axis: str, size: int, what: str) -> None:
    if size % parts:
        nearest = max(n for n in range(1, parts + 1) if size % n == 0)
        fitting = max(parts * round(size / parts), parts)
        raise ConfigError(f"must be a multiple of {axis} = {parts}, got {size}: take {fitting}, or {axis} = {nearest}", what)
