"""What a step will take by formula, without compiling it: to search meshes, and to hold the model of time to published runs.

What XLA makes of a program is better read from it (`lab.ahead`); this is its shape: products of every layer, forward, again where
the backward pass recomputes, and back; turns of a pipeline that have nothing to do; and the messages (`lab.messages`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.core.mesh import BATCH
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.footprint import ENTRY, held, kinds, parts, room, schedule
from llm_jax.lab.messages import messages
from llm_jax.models import count
from llm_jax.models.block import Layer, layer_entries
from llm_jax.nn.moe import MoE
from llm_jax.train.ahead import roofline
from llm_jax.train.ahead.roofline import Estimate

BACK = 3.5  # products of fused attention's gradient for each of its forward ones: both of its kernels compute the scores again
ROUTED = 16  # times that rows on their way to experts and back are read or written, where they are sorted and sent
NORMS = 12  # times that a pass over a layer reads or writes its stream, beside its products


def estimate(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], topology: Topology) -> Estimate:
    """The time of a step on a mesh (axis → devices). Raises `ConfigError` where it cannot be divided into the slices."""
    model, data, final = experiment.model, experiment.data, experiment.model.final
    words, inputs = experiment.lengths
    tokens = data.batch_size * words / parts(mesh, (*BATCH, "sequence"))  # that one model's share of devices works on
    plan, tensor, size = schedule(experiment, mesh), mesh.get("tensor", 1), final.precision.dtype.itemsize
    idle = plan.turns / (plan.micro * plan.rounds)
    output = model.head.entries(final, vocabulary) or model.embedding.entries(final.width, vocabulary)
    products, kernels, moved = 6.0 * output * tokens, 0.0, 0.0
    with platform.targeting("tpu"):
        seen = visited(experiment, words)
    for stack in model.stacks.values():
        for layer, number in kinds(stack).items():
            entries, again, through = layer_entries(stack, layer), stack.remat == "full", number * tokens * idle
            last = _last(layer, stack.width) if again else 0
            products += through * ((8.0 if again else 6.0) * entries - 2.0 * last)
            scores = layer.attention.scores(stack.width) if layer.attention else 0
            kernels += 2.0 * scores * words * through * seen * (1 + BACK + again)
            inner = layer.attention.inner(stack.width) if layer.attention else 0
            moved += through * size * (2 + again) * (NORMS * stack.width * tensor + 2 * inner + _routed(layer, stack.width, mesh))
    optimizer = 2.0 * ENTRY * (2 + experiment.optimizer.slots) * held(experiment, vocabulary, mesh)
    return roofline.estimate(
        products=products / tensor,
        kernels=kernels / tensor,
        memory=moved / tensor + optimizer,
        collectives=messages(experiment, vocabulary, mesh, tokens, topology),
        topology=topology,
        model=data.batch_size * _flops_per_row(model, vocabulary, words, inputs),
        head=head(experiment),
    )


def _routed(layer: Layer, width: int, mesh: Mapping[str, int]) -> float:
    """Times a channel that a token is written and read on its way through experts, empty places among their rows too."""
    if not isinstance(layer.ffn, MoE):
        return 0.0
    hidden = layer.ffn.expert.hidden(width) * (layer.ffn.branches + 1)
    return layer.ffn.used * room(layer, mesh) * (ROUTED * width + 2 * hidden)


def _last(layer: Layer, width: int) -> int:
    """Entries of the layer's last matrix, where no gradient asks for its result: that of experts is for their weights."""
    ffn = layer.ffn.shared if isinstance(layer.ffn, MoE) else layer.ffn
    return ffn.hidden(width) * width if ffn else 0


_flops_per_row = functools.lru_cache(count.flops_per_row)


def filled(experiment: Experiment, mesh: Mapping[str, int]) -> float:
    """Share of the rows that experts have room for that are multiplied, on average: kernels leave out what comes after the last."""
    found = [
        (layer.ffn.entries(stack.width), room(layer, mesh))
        for stack in experiment.model.stacks.values()
        for layer in stack.in_full
        if isinstance(layer.ffn, MoE)
    ]
    return sum(entries for entries, _ in found) / sum(entries * more for entries, more in found) if found else 1.0


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _attending(experiment: Experiment) -> list[tuple[Any, int]]:
    """Every mixer that attends, and the width of its stack."""
    layers = [(stack, layer, number) for stack in experiment.model.stacks.values() for layer, number in kinds(stack).items()]
    return [
        one
        for stack, layer, number in layers
        if layer.attention and layer.attention.attends
        for one in [(layer.attention, stack.width)] * number
    ]


def visited(experiment: Experiment, length: int) -> float:
    """Share of the pairs of queries and keys whose blocks a kernel visits, over all layers: what no mask shows is skipped."""
    found = [
        (mixer.scores(width), shown(mixer.mask if hasattr(mixer, "mask") else None, length))
        for mixer, width in _attending(experiment)
    ]
    return sum(scores * share for scores, share in found) / max(sum(scores for scores, _ in found), 1)


def shown(mask: Any, length: int) -> float:
    """The same of one mask over rows of `length` tokens."""
    return _shown(mask, length, min(platform.traits().attention_block, length))


@functools.lru_cache
def _shown(mask: Any, length: int, size: int) -> float:
    blocks = -(-length // size)
    if mask is None:
        return (blocks + 1) / (2 * blocks)
    shown = 0
    for block in range(blocks):
        first, stop = mask.span(block * size, (block + 1) * size - 1)
        low = 0 if first is None else max(first, 0) // size
        high = blocks if stop is None else min(-(-stop // size), blocks)
        shown += high - low
    return shown / blocks**2


def head(experiment: Experiment) -> int:
    """Channels of a head, over which scores are summed."""
    sizes = [mixer.scores(width) // (2 * mixer.heads_for_bias) for mixer, width in _attending(experiment)]
    return min(sizes, default=128)
