"""What one device holds and keeps during a step, by formula, on any mesh (axis → devices): to search meshes without compiling."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from llm_jax.core.mesh import BATCH
from llm_jax.core.sharding import dividing, rules
from llm_jax.lab.experiment import Experiment
from llm_jax.models import count
from llm_jax.models.block import Layer, layer_parameters
from llm_jax.models.model import Model
from llm_jax.models.stack import Stack
from llm_jax.nn.dispatch import Dropless
from llm_jax.nn.moe import MoE

ENTRY = 4  # bytes of a parameter, its gradient, or one of the optimizer's numbers


def parts(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    """How many pieces these axes cut something into."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def gathered_over(experiment: Experiment, mesh: Mapping[str, int], width: int, *, experts: bool = False) -> tuple[str, ...]:
    """The axes that matrices of so many inputs are split over, and gathered over when they are used; experts: those of `Bank`."""
    free = [axis for axis in rules(experiment.mesh)["embed"] if mesh.get(axis, 1) > 1 and not (experts and axis == "expert")]
    return dividing(free, width, mesh)


@functools.lru_cache
def kinds(stack: Stack) -> Counter[Layer]:
    """What its layers are, and how many of each."""
    return Counter(stack.in_full)


def split_weights(
    experiment: Experiment, mesh: Mapping[str, int], stack: Stack, layer: Layer
) -> list[tuple[float, tuple[str, ...]]]:
    """Parameters of a layer, and the axes that they are gathered over: those of all tokens, and those of a device's experts."""
    banks = layer.ffn.experts * layer.ffn.expert.parameters(stack.width) if isinstance(layer.ffn, MoE) else 0
    dense = layer_parameters(stack, layer) - banks, gathered_over(experiment, mesh, stack.width)
    return [dense, (banks / mesh.get("expert", 1), gathered_over(experiment, mesh, stack.width, experts=True))]


def room(layer: Layer, mesh: Mapping[str, int]) -> float:
    """Rows that a device has place for, over those that reach its experts on average: what is not filled is not multiplied."""
    if not isinstance(layer.ffn, MoE) or not isinstance(layer.ffn.dispatch, Dropless):
        return 1.0
    devices = mesh.get("expert", 1)
    return float(min(layer.ffn.dispatch.room or devices, devices))


def tables(experiment: Experiment, vocabulary: int) -> list[int]:
    """Parameters of the embeddings and of the head."""
    model, final = experiment.model, experiment.model.final
    return [model.tables * model.embedding.parameters(final.width, vocabulary), model.head.parameters(final, vocabulary)]


def held(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> float:
    """Parameters of one device: whole rows of matrices where no axis splits them."""
    final, tensor = experiment.model.final, mesh.get("tensor", 1)
    total = sum(tables(experiment, vocabulary)) / parts(mesh, gathered_over(experiment, mesh, final.width))
    for stack in experiment.model.stacks.values():
        for layer, number in kinds(stack).items():
            own = sum(entries / parts(mesh, over) for entries, over in split_weights(experiment, mesh, stack, layer))
            total += number * own / mesh.get("stage", 1)
    return total / tensor


def memory(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> float:
    """Bytes of a device at the peak of a step: parameters, gradients, moments, weights gathered for one layer, and what is kept."""
    own = ENTRY * held(experiment, vocabulary, mesh) * (2 + experiment.optimizer.slots)
    return own + _gathered(experiment, vocabulary, mesh) + kept(experiment, vocabulary, mesh)


def kept(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> float:
    """Bytes that one device keeps of its rows for the backward pass: the stream that every layer begins with is whole on each."""
    model, micro = experiment.model, experiment.data.batch_size // experiment.train.accumulate
    words, inputs = experiment.lengths
    rows, slots = max(micro // parts(mesh, BATCH), 1), experiment.optimizer.slots
    whole = _of_rows(model, vocabulary, rows, words, slots, inputs)
    stream = sum(s.depth * s.precision.dtype.itemsize * s.width * rows * words for s in model.stacks.values())
    layer = max(_travelling(stack, layer, mesh) for stack in model.stacks.values() for layer in kinds(stack)) * rows * words
    return (stream + (whole - stream + layer) / mesh.get("tensor", 1)) / mesh.get("sequence", 1)


@functools.lru_cache
def _of_rows(model: Model, vocabulary: int, rows: int, words: int, slots: int, inputs: int | None) -> float:
    """Bytes of a device that has all axes but those of rows for itself."""
    with_rows, without = (count.training_memory(model, vocabulary, n, words, slots, inputs) for n in (rows, 0))
    return with_rows - without - rows * words * sum(_written_out(stack, words) for stack in model.stacks.values())


def _written_out(stack: Stack, words: int) -> float:
    """Bytes for each token that `models.count` has for scores, which kernels write nowhere."""
    found = [
        2 * 4 * layer.attention.heads_for_bias * words for layer in stack.in_full if layer.attention and layer.attention.attends
    ]
    return max(found, default=0) if stack.remat != "none" else sum(found)


def _travelling(stack: Stack, layer: Layer, mesh: Mapping[str, int]) -> float:
    """Bytes for each token of what travels to the experts of a layer and lies there: sorted, packed, sent, sorted again, answered,
    and so back, three times in places of its own device and four in those of the experts', and the gradients of all."""
    if mesh.get("expert", 1) == 1 or not isinstance(layer.ffn, MoE):
        return 0.0
    ffn, more = layer.ffn, room(layer, mesh)
    hidden = ffn.active * ffn.expert.hidden(stack.width) * (ffn.branches + 1)
    return stack.precision.dtype.itemsize * (2 * (3 + 4 * more) * ffn.active * stack.width + (more - 1) * hidden)


def _gathered(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> float:
    """Bytes of the largest layer's matrices, or of a table, in the compute dtype and once more ahead, and of their gradient."""
    final, found = experiment.model.final, [0.0]
    if gathered_over(experiment, mesh, final.width):
        found += [(2 * final.precision.dtype.itemsize + ENTRY) * one for one in tables(experiment, vocabulary)]
    for stack in experiment.model.stacks.values():
        for layer in kinds(stack):
            gathered = sum(entries for entries, over in split_weights(experiment, mesh, stack, layer) if over)
            found.append(3 * stack.precision.dtype.itemsize * gathered)
    return max(found) / mesh.get("tensor", 1)
