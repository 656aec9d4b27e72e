"""The messages of a step by formula, for every axis of a mesh (axis → devices).

Weights are gathered over the axes that split their inputs, forward and back, and their gradients summed there, then over `data` and
`replica`. Along `tensor` the stream is gathered and scattered around both branches of a layer; along `sequence` keys and values are
gathered, or go round; along `expert` tokens travel to their experts and back; along `stage` from one run of layers to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llm_jax.core.chips import Topology
from llm_jax.core.mesh import across_slices
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.footprint import gathered_over, kinds, parts, schedule, split_weights, tables
from llm_jax.models.block import Layer
from llm_jax.models.pipeline import Schedule
from llm_jax.models.stack import Stack
from llm_jax.nn.moe import MoE
from llm_jax.train.ahead.collectives import Collective, Kind

COPIES = "data", "replica"
ROWS = 16  # of a matrix on each device, from which on libtpu gathers them; fewer it adds up, each device's part among zeros


def turns_of_a_layer(plan: Schedule) -> float:
    """Times that a device runs a layer on a micro-batch, for each of the model's layers: 1 / stages without idle ones."""
    return plan.turns / (plan.rounds * plan.stages)


def messages(
    experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], tokens: float, topology: Topology
) -> Iterator[Collective]:
    """All of a step's. tokens: that a device works on."""
    step = _Step(experiment, mesh, topology, tokens / experiment.train.accumulate, schedule(experiment, mesh))
    for stack in experiment.model.stacks.values():
        for layer, count in kinds(stack).items():
            for found in (step.weights(stack, layer), step.branches(stack, layer), step.sequence(stack, layer)):
                yield from (_times(one, count) for one in found)
        yield from step.stages(stack)
    final = experiment.model.final
    over = gathered_over(experiment, mesh, final.width)
    for table in tables(experiment, vocabulary):
        whole = final.precision.dtype.itemsize * table / mesh.get("tensor", 1)
        yield from step.send("all-gather", whole, over, step.again, overlaps=False)
        yield from step.send("all-reduce", whole, over, step.again, overlaps=False)
        yield from step.send("all-reduce", whole / parts(mesh, over), COPIES, 1, overlaps=False)


def _times(one: Collective, count: int) -> Collective:
    return Collective(one.kind, one.bytes, one.parts, one.axes, count=one.count * count, overlaps=one.overlaps, crosses=one.crosses)


@dataclass(frozen=True)
class _Step:
    """tokens: of a micro-batch of `train.accumulate`, on one device."""

    experiment: Experiment
    mesh: Mapping[str, int]
    topology: Topology
    tokens: float
    plan: Schedule

    @property
    def again(self) -> int:
        """Micro-batches whose gradients are added up."""
        return self.experiment.train.accumulate

    @property
    def _idle(self) -> float:
        """What turns without rows make of what every turn sends."""
        return self.plan.turns / (self.plan.micro * self.plan.rounds)

    @property
    def _aside(self) -> bool:
        """Whether another core gathers and sums while the matrix unit computes."""
        return bool(self.topology.chip.libtpu)

    def send(self, kind: Kind, size: float, axes: tuple[str, ...], count: float, overlaps: bool = True) -> Iterator[Collective]:
        """One kind of message among the devices along these axes; none where they are one."""
        axes = tuple(axis for axis in axes if self.mesh.get(axis, 1) > 1)
        if axes and size > 0:
            crosses = any(self._across.get(axis, 1) > 1 for axis in axes)
            yield Collective(kind, size, parts(self.mesh, axes), axes, count=count, overlaps=overlaps, crosses=crosses)

    @property
    def _across(self) -> Mapping[str, int]:
        return across_slices(self.mesh, self.topology.slices) if self.topology.slices > 1 else {}

    def weights(self, stack: Stack, layer: Layer) -> Iterator[Collective]:
        """v5e scatters sums within one dimension of a slice, and over several adds up everywhere; sparse cores do neither."""
        turns, tensor = turns_of_a_layer(self.plan), self.mesh.get("tensor", 1)
        for entries, over in split_weights(self.experiment, self.mesh, stack, layer):
            devices, whole = parts(self.mesh, over), stack.precision.dtype.itemsize * entries / tensor
            enough = stack.width >= ROWS * devices
            gathering: Kind = "all-gather" if enough else "all-reduce"
            summing: Kind = "reduce-scatter" if enough and (self._aside or devices <= max(self.topology.shape)) else "all-reduce"
            yield from self.send(gathering, whole, over, 2 * turns * self.again)
            yield from self.send(summing, whole, over, turns * self.again, overlaps=self._aside)
            yield from self.send("all-reduce", whole / devices / self.plan.stages, COPIES, 1)

    def branches(self, stack: Stack, layer: Layer) -> Iterator[Collective]:
        """Of the stream around attention and feed-forward, and of tokens on their way to experts."""
        passes = (3 if stack.remat == "full" else 2) * self._idle
        stream = stack.precision.dtype.itemsize * self.tokens * stack.width
        count = sum(part is not None for part in (layer.attention, layer.ffn)) * passes * self.again
        for kind in ("all-gather", "reduce-scatter"):
            yield from self.send(kind, stream, ("tensor",), count)
        if isinstance(layer.ffn, MoE):
            yield from self.send("all-to-all", stream * layer.ffn.used, ("expert",), 2 * passes * self.again, overlaps=False)

    def sequence(self, stack: Stack, layer: Layer) -> Iterator[Collective]:
        """Of keys and values, what the projections make less the queries; and of queries and results, where rows are dealt."""
        mixer, devices = layer.attention, self.mesh.get("sequence", 1)
        if mixer is None or not mixer.attends:
            return
        queries = mixer.scores(stack.width) / 2
        size = stack.precision.dtype.itemsize * self.tokens / self.mesh.get("tensor", 1)
        pieces, forward = size * (mixer.inner(stack.width) - queries), (2 if stack.remat == "full" else 1) * self._idle * self.again
        back = self._idle * self.again
        yield from self.send("collective-permute", size * queries, ("sequence",), 2 * (forward + back), overlaps=False)
        if self.experiment.mesh.context == "gather":
            yield from self.send("all-gather", pieces * devices, ("sequence",), forward, overlaps=self._aside)
            yield from self.send("reduce-scatter", pieces * devices, ("sequence",), back, overlaps=self._aside)
            return
        yield from self.send("collective-permute", pieces, ("sequence",), (devices - 1) * forward)
        yield from self.send("collective-permute", 3 * pieces, ("sequence",), devices * back)  # their gradients in float32 too

    def stages(self, stack: Stack) -> Iterator[Collective]:
        """Of micro-batches from stage to stage, forward and back; and of all rows to the first stage and from it."""
        whole = stack.precision.dtype.itemsize * self.tokens * stack.width * self.plan.stages
        yield from self.send(
            "collective-permute", whole / self.plan.micro, ("stage",), 2 * self.plan.turns * self.again, overlaps=False
        )
        for kind in ("all-gather", "reduce-scatter"):
            yield from self.send(kind, whole, ("stage",), 2 * self.again, overlaps=False)
