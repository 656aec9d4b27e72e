"""What a step will take by formula, without compiling it: to search meshes, and to hold the model of time to published runs.

What XLA makes of a program is better read from it (`lab.ahead`); this is its shape: products of every layer, forward, again where
the backward pass recomputes, and back; weights gathered over `fsdp` forward and back, and their gradients summed; activations
gathered and scattered over `tensor` around both branches of a layer; gradients summed over `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.lab.experiment import Experiment
from llm_jax.models import count
from llm_jax.models.block import layer_entries, layer_parameters
from llm_jax.train.ahead import roofline
from llm_jax.train.ahead.collectives import Collective, Kind
from llm_jax.train.ahead.roofline import Estimate

BACK = 3.5  # products of fused attention's gradient for each of its forward ones: both of its kernels compute the scores again
NORMS = 6  # times that a pass over a layer reads or writes its stream, beside its products


def estimate(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], topology: Topology) -> Estimate:
    """The time of a step on a mesh (axis → devices)."""
    model, data, final = experiment.model, experiment.data, experiment.model.final
    words, inputs = experiment.objective.lengths(data.sequence_length, model=model, packed=data.packing.segmented)
    tokens = data.batch_size * words / (mesh.get("data", 1) * mesh.get("fsdp", 1))  # that one model's share of devices works on
    tensor, size = mesh.get("tensor", 1), final.precision.dtype.itemsize
    output = model.head.entries(final, vocabulary) or model.embedding.entries(final.width, vocabulary)
    products, kernels, moved = 6.0 * output * tokens, 0.0, 0.0
    with platform.targeting("tpu"):
        seen = visited(experiment, words)
    for stack in model.stacks.values():
        for layer in stack.in_full:
            entries, again = layer_entries(stack, layer), stack.remat == "full"
            last = layer.ffn.hidden(stack.width) * stack.width if layer.ffn and again else 0  # no gradient asks for its result
            products += tokens * ((8.0 if again else 6.0) * entries - 2.0 * last)
            scores = layer.attention.scores(stack.width) if layer.attention else 0
            kernels += 2.0 * scores * words * tokens * seen * (1 + BACK + again)
            inner = layer.attention.inner(stack.width) if layer.attention else 0
            moved += tokens * size * (2 + again) * (NORMS * stack.width * tensor + 2 * inner)
    optimizer = 4.0 * 2 * (2 + experiment.optimizer.slots) * count.parameters(model, vocabulary) / mesh.get("fsdp", 1)
    return roofline.estimate(
        products=products / tensor,
        kernels=kernels / tensor,
        memory=(moved + optimizer) / tensor,
        collectives=list(_messages(experiment, vocabulary, mesh, tokens, max(topology.shape))),
        topology=topology,
        model=data.batch_size * count.flops_per_row(model, vocabulary, words, inputs),
        head=head(experiment),
    )


def _messages(
    experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], tokens: float, longest: int
) -> Iterator[Collective]:
    """longest: chips along a slice's longest dimension: libtpu scatters sums within one; over several it adds up everywhere."""
    model, tensor = experiment.model, mesh.get("tensor", 1)
    summing: Kind = "reduce-scatter" if mesh.get("fsdp", 1) <= longest else "all-reduce"

    def send(kind: Kind, size: float, axis: str, count: float, overlaps: bool = True) -> Iterator[Collective]:
        if mesh.get(axis, 1) > 1 and size > 0:
            yield Collective(kind, size, mesh[axis], (axis,), count=count, overlaps=overlaps)

    turns = experiment.train.accumulate
    for stack in model.stacks.values():
        size, passes = stack.precision.dtype.itemsize, 3 if stack.remat == "full" else 2
        for layer in stack.in_full:
            weights = size * layer_parameters(stack, layer) / tensor
            yield from send("all-gather", weights, "fsdp", 2 * turns)
            yield from send(summing, weights, "fsdp", turns, overlaps=False)
            yield from send("all-reduce", weights / mesh.get("fsdp", 1), "data", 1)
            branches = sum(part is not None for part in (layer.attention, layer.ffn))
            stream = size * tokens * stack.width / turns
            for kind in ("all-gather", "reduce-scatter"):
                yield from send(kind, stream, "tensor", branches * passes * turns)
    final = model.final
    tables = [model.embedding.parameters(final.width, vocabulary), model.head.parameters(final, vocabulary)]
    for table in tables:
        whole = final.precision.dtype.itemsize * table / tensor
        yield from send("all-gather", whole, "fsdp", turns, overlaps=False)
        yield from send("all-reduce", whole, "fsdp", turns, overlaps=False)
        yield from send("all-reduce", whole / mesh.get("fsdp", 1), "data", 1, overlaps=False)


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _attending(experiment: Experiment) -> list[tuple[Any, int]]:
    """Every mixer that attends, and the width of its stack."""
    stacks = experiment.model.stacks.values()
    return [
        (layer.attention, stack.width) for stack in stacks for layer in stack.in_full if layer.attention and layer.attention.attends
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
    size = min(platform.traits().attention_block, length)
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
