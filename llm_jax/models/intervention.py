"""The network with something done to its residual stream: read between layers, added to, a layer skipped or replaced.

def skip_two(stack, layer, block, x):
    return x if layer == 2 else block(x)

logits = intervened(model, vocabulary, params, batch, around=skip_two)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llm_jax.core.config import substitute
from llm_jax.core.types import Batch
from llm_jax.models.block import Block
from llm_jax.models.model import Model, Params, unstack_layers

# (stack, layer, block, stream) -> stream; a stream is [B, L, D], or [B, L, n, D] of n copies
Around = Callable[[str, int, Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


def unrolled(model: Model) -> Model:
    """The same function with its layers one by one and nothing recomputed, so that each can be looked at."""
    paths = (f"{path}.remat" if path else "remat" for path in model.stacks)
    return substitute(model.with_layers("unrolled"), dict.fromkeys(paths, "none"))


def observed(model: Model, vocabulary: int, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    """The output, and what the layers leave in "intermediates", each layer alone whether or not `model` scans them."""
    inputs, given = model.arguments(batch)
    network, variables = unrolled(model).build(vocabulary), {"params": unstack_layers(params, model)}
    output, left = network.apply(variables, *inputs, **given, mutable=["intermediates"])
    return output, left["intermediates"]


def intervened(model: Model, vocabulary: int, params: Params, batch: Batch, *, around: Around) -> jax.Array:
    """The output where each layer of each stack, `block`, is replaced by `x -> around(stack, layer, block, x)`.

    stack: "" or, in an encoder-decoder, "encoder" or "decoder"; layer: counted from 0. The rest is the network's own code, so that
    `block(x)` alone gives the model's output; `block` may be called once or not at all.
    """

    def interceptor(call, args, kwargs, context):
        place = _place(context)
        if place is None:
            return call(*args, **kwargs)
        x, *rest = args
        return around(*place, lambda x: call(x, *rest, **kwargs), x)

    inputs, given = model.arguments(batch)
    network, variables = unrolled(model).build(vocabulary), {"params": unstack_layers(params, model)}
    with nn.intercept_methods(interceptor):
        return network.apply(variables, *inputs, **given)


def _place(context: Any) -> tuple[str, int] | None:
    """Stack and number of the layer whose call is intercepted; None for what is no layer of a stack."""
    if not isinstance(context.module, Block) or context.method_name != "__call__":
        return None
    *stack, name = context.module.path
    found = re.fullmatch(r"layers_(\d+)", name)
    return ("/".join(stack), int(found[1])) if found else None
