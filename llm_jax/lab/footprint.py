"""What one device holds and keeps during a step, by formula, on any mesh (axis → devices): to search meshes without compiling."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from llm_jax.core import platform
from llm_jax.core.mesh import BATCH
from llm_jax.core.sharding import dividing, rules
from llm_jax.lab.experiment import Experiment
from llm_jax.models import residuals
from llm_jax.models.block import Layer, layer_parameters
from llm_jax.models.pipeline import Schedule
from llm_jax.models.stack import Stack
from llm_jax.nn.dispatch import Dropless
from llm_jax.nn.kernels.blocks import block_count
from llm_jax.nn.moe import MoE

ENTRY = 4  # bytes of a parameter, its gradient, or one of the optimizer's numbers
NORM = 3  # float32 arrays as wide as the stream that a norm leaves to its gradient


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


def schedule(experiment: Experiment, mesh: Mapping[str, int]) -> Schedule:
    """How rows go through the stages of a mesh."""
    stages, given = mesh.get("stage", 1), experiment.mesh
    return Schedule(stages, given.rounds if stages > 1 else 1, given.microbatches or stages, 1)


def memory(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], target: str = "tpu") -> float:
    """Bytes of a device at the peak of a step: parameters, gradients, moments, weights gathered for one layer, and what is kept.

    target: the platform, as attention's scores are kept on some.
    """
    train = experiment.train
    copies = 2 + experiment.optimizer.slots + (train.average is not None) + (train.accumulate > 1)  # sums over micro-batches
    own = ENTRY * held(experiment, vocabulary, mesh) * copies
    return own + _gathered(experiment, vocabulary, mesh) + kept(experiment, vocabulary, mesh, target)


def kept(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], target: str = "tpu") -> float:
    """Bytes that one device keeps of its rows for the backward pass, and needs beside them at its peak: where logits are judged, or
    in the layer that is computed again."""
    with platform.targeting(target):
        layers = list(_layers(experiment, mesh))
        return sum(one.until for one in layers) + max(_ending(experiment, vocabulary, mesh), *(one.during for one in layers))


class _Kept(NamedTuple):
    """Bytes of a device. until: of all layers of a kind until they are differentiated; during: of one while it is."""

    until: float
    during: float


def _layers(experiment: Experiment, mesh: Mapping[str, int]) -> Iterator[_Kept]:
    """Of every kind of layer."""
    model, plan, words = experiment.model, schedule(experiment, mesh), experiment.lengths[0]
    rows, cut, tensor = _rows(experiment, mesh), mesh.get("sequence", 1), mesh.get("tensor", 1)
    turns = plan.turns / (plan.micro * plan.rounds)  # idle ones leave as much behind
    for stack in model.stacks.values():
        cross = model.across if stack is model.final else None
        length = words if stack is model.final else experiment.lengths[1] or words
        given = {"cross": cross, "inputs": experiment.lengths[1] or words, "segmented": experiment.data.packing.segmented}
        for layer, number in kinds(stack).items():
            left = residuals.kept(stack, layer, length, **given)
            most = left if stack.remat == "none" else residuals.kept(stack, layer, length, **given, again=True)
            until, during = (rows * (one.whole + one.split / tensor) / cut for one in (left, most))
            tokens = rows * length / tensor / cut
            keys, sent = tokens * _whole_keys(experiment, stack, layer, mesh), tokens * _travelling(stack, layer, mesh)
            if stack.remat == "none":
                until, during = until + keys + tokens * _received(stack, layer, mesh), 0.0
            else:
                during += keys
            yield _Kept(number * (turns * until + _copied(experiment, stack, layer, mesh, left.weights)), during + sent)


def _rows(experiment: Experiment, mesh: Mapping[str, int]) -> int:
    """Rows of a device that are worked on at once; where layers are in stages it has as many of fewer layers."""
    return max(experiment.data.batch_size // experiment.train.accumulate // parts(mesh, BATCH), 1)


def _ending(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> float:
    """Bytes of the logits that are judged at once, in float32, and their gradient, in the compute dtype; and of what the last norm
    leaves, in float32, and makes."""
    final, tensor, size = experiment.model.final, mesh.get("tensor", 1), experiment.model.final.precision.dtype.itemsize
    tokens, ids = _rows(experiment, mesh) * experiment.lengths[0] // mesh.get("sequence", 1), vocabulary // tensor
    judged = -(-tokens // block_count(tokens, ids))
    return (4.0 + size) * ids * judged + tokens * final.width * (4 * NORM + 2 * size)


def _copied(experiment: Experiment, stack: Stack, layer: Layer, mesh: Mapping[str, int], weights: float) -> float:
    """Bytes that are kept of one layer's matrices, in the pieces in which devices hold them: `weights` in the compute dtype; where
    stages have other layers in every round, the matrices of each turn, and the sum of their gradients over the turns."""
    plan, entries = schedule(experiment, mesh), layer_parameters(stack, layer)
    if plan.rounds > 1:
        weights = (stack.precision.dtype.itemsize * plan.turns / plan.rounds + ENTRY) * entries
    share = sum(own / parts(mesh, over) for own, over in split_weights(experiment, mesh, stack, layer)) / max(entries, 1)
    return weights * share / mesh.get("tensor", 1) / plan.stages


def _whole_keys(experiment: Experiment, stack: Stack, layer: Layer, mesh: Mapping[str, int]) -> float:
    """Bytes for each token of a device of the others' keys and values, where they are gathered along rows."""
    if not layer.attention or not layer.attention.attends or experiment.mesh.context == "ring":
        return 0.0
    return stack.precision.dtype.itemsize * layer.attention.cached(stack.width) * (mesh.get("sequence", 1) - 1)


def _travelling(stack: Stack, layer: Layer, mesh: Mapping[str, int]) -> float:
    """Bytes for each token of what travels to the experts of a layer and lies there: sorted, packed, sent, sorted again, answered,
    and so back, three times in places of its own device and four in those of the experts', and the gradients of all."""
    if mesh.get("expert", 1) == 1 or not isinstance(layer.ffn, MoE):
        return 0.0
    ffn, more = layer.ffn, room(layer, mesh)
    hidden = ffn.active * ffn.expert.hidden(stack.width) * (ffn.branches + 1)
    return stack.precision.dtype.itemsize * (2 * (3 + 4 * more) * ffn.active * stack.width + (more - 1) * hidden)


def _received(stack: Stack, layer: Layer, mesh: Mapping[str, int]) -> float:
    """Bytes for each token that experts keep of places beyond those that are filled on average: of what they read and answer, and
    of their hidden units before and after they are bent and joined."""
    if mesh.get("expert", 1) == 1 or not isinstance(layer.ffn, MoE):
        return 0.0
    hidden = layer.ffn.expert.hidden(stack.width) * (2 * layer.ffn.branches + 1)
    return stack.precision.dtype.itemsize * (room(layer, mesh) - 1) * layer.ffn.active * (2 * stack.width + hidden)


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
