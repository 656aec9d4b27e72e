"""The best mesh for experiments on a machine, by formula (`lab.expected`): every way to give its devices to axes is tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
from rich.table import Table

from llm_jax.core import chips, platform
from llm_jax.core.chips import TPUS, Topology
from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.lab import expected, footprint
from llm_jax.lab.ahead import declared
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.lab.population import check_mesh, structure
from llm_jax.nn.moe import MoE
from llm_jax.train.ahead.roofline import Estimate

GIB = 2**30
SAFE = 0.75  # of a device's memory that the formula may fill: compiled programs took up to a third more than it says
SHOWN = 10  # candidates in the table
MICRO = 1, 2, 4, 8  # micro-batches, in stages, that are tried where the experiment names none
TENSOR = 16  # devices along it, at most: every layer waits for its messages four times


@dataclass(frozen=True)
class Candidate:
    """A mesh with all axes worked out, the time of a step of each experiment on it, and bytes of a device, the most of them."""

    mesh: Mesh
    estimates: tuple[Estimate, ...]
    memory: float

    @property
    def seconds(self) -> float:
        """Of a step of each of them."""
        return sum(one.seconds for one in self.estimates)

    @property
    def mfu(self) -> float:
        """The mean of them."""
        return sum(one.mfu for one in self.estimates) / len(self.estimates)

    @property
    def bound(self) -> str:
        """What takes the most time."""
        parts = ("products", "kernels", "memory", "ici", "dcn")
        return max(parts, key=lambda part: sum(getattr(one, part) for one in self.estimates))

    @property
    def split(self) -> str:
        """The axes that have more than one device."""
        micro = [f"microbatches={self.mesh.microbatches}"] if self.mesh.stage > 1 else []
        return " × ".join([f"{axis}={size}" for axis, size in self.mesh.sizes.items() if size > 1] + micro) or "one device"

    @property
    def flags(self) -> list[str]:
        """The assignments that `--set` takes for it."""
        micro = [f"mesh.microbatches={self.mesh.microbatches}"] if self.mesh.stage > 1 else []
        return [f"mesh.{axis}={size}" for axis, size in self.mesh.sizes.items() if axis != "population"] + micro


@dataclass(frozen=True)
class Ranking:
    """Meshes that fit into memory, the fastest first, and how many there are of which none does."""

    topology: Topology
    fitting: tuple[Candidate, ...]
    tried: int

    @property
    def best(self) -> Candidate:
        """The fastest."""
        return self.fitting[0]


def of_ablation(ablation: Ablation, topology: Topology) -> Ranking:
    """Of a mesh for all its arms. Raises `ConfigError`."""
    alike = {structure(one): one for one in map(ablation.experiment, ablation.arms)}
    return rank([(one, declared(one).vocabulary) for one in alike.values()], topology)


def rank(experiments: Sequence[tuple[Experiment, int]], topology: Topology) -> Ranking:
    """Of a mesh for all of these (experiment, size of its vocabulary) together. Raises `ConfigError` where there is none."""
    with platform.targeting("tpu"):  # where layers are scanned, and may be split into stages
        found = [one for mesh in _meshes(experiments[0][0], topology) if (one := _judged(experiments, mesh, topology))]
    if not found:
        rows = experiments[0][0].data.batch_size
        raise ConfigError(
            f"no mesh of {topology.chips * topology.chip.devices} devices divides the model and its {rows} rows a step: "
            "make data.batch_size a multiple of them",
            "--autoshard",
        )
    limit = SAFE * topology.chip.memory / topology.chip.devices
    fitting = sorted((one for one in found if one.memory <= limit), key=lambda one: (one.seconds, _plainness(one.mesh)))
    if not fitting:
        least = min(found, key=lambda one: one.memory)
        needs = f"{least.split} needs the least, {least.memory / GIB:.1f} of {limit / GIB:.1f} GiB a device"
        plain = any(stack.remat == "none" for one, _ in experiments for stack in one.model.stacks.values())
        ways = ["more devices", *["model.remat=full"] * plain, "fewer rows at a time (data.batch_size, train.accumulate)"]
        where = f"{needs}, {SAFE:.0%} of what there is, as this is a formula"
        raise ConfigError(f"none of {len(found)} meshes fits: {where}: take {', '.join(ways)}", "--autoshard")
    return Ranking(topology, tuple(fitting), len(found))


def _plainness(mesh: Mesh) -> tuple[int, ...]:
    """Of two that are as fast the one that splits over fewer axes, and then over the more usual."""
    sizes = mesh.sizes
    return sum(size > 1 for size in sizes.values()), *(sizes[axis] for axis in ("stage", "tensor", "sequence", "expert", "fsdp"))


def _judged(experiments: Sequence[tuple[Experiment, int]], mesh: Mesh, topology: Topology) -> Candidate | None:
    """None where the mesh does not divide one of them."""
    estimates, memory = [], 0.0
    for experiment, vocabulary in experiments:
        own = replace(experiment, mesh=mesh)
        try:
            check_mesh(own, mesh)
            estimates.append(expected.estimate(own, vocabulary, mesh.sizes, topology))
        except ConfigError:
            return None
        memory = max(memory, footprint.memory(own, vocabulary, mesh.sizes))
    return Candidate(mesh, tuple(estimates), memory)


def _meshes(experiment: Experiment, topology: Topology) -> Iterator[Mesh]:
    """Every way to give the devices to the axes that the model has something for; replicas are slices."""
    devices, given = topology.chips * topology.chip.devices // topology.slices, experiment.mesh
    most = _most(experiment)
    for sizes in _factored(devices, list(most.values())):
        mesh = replace(given, population=None, replica=topology.slices, **dict(zip(most, sizes, strict=True)))
        free = mesh.stage > 1 and given.microbatches is None
        yield from (replace(mesh, microbatches=n * mesh.stage) for n in MICRO) if free else [mesh]


def _most(experiment: Experiment) -> dict[str, int]:
    """Axis → devices along it, at most."""
    layers = [layer for stack in experiment.model.stacks.values() for layer in stack.in_full]
    experts = max((layer.ffn.experts for layer in layers if isinstance(layer.ffn, MoE)), default=1)
    scanned = all(stack.scanned for stack in experiment.model.stacks.values())
    stages = min(stack.repeats for stack in experiment.model.stacks.values()) if scanned else 1
    heads = min((layer.attention.heads_for_bias for layer in layers if layer.attention and layer.attention.attends), default=1)
    rows = experiment.data.batch_size // experiment.train.accumulate
    length = experiment.data.sequence_length // 128  # kernels want whole vector registers
    return {
        "stage": stages,
        "data": rows,
        "fsdp": rows,
        "expert": experts,
        "sequence": length,
        "tensor": min(heads, TENSOR),
    }


def _factored(number: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All tuples of that product, each entry at most so large."""
    if len(most) == 1:
        if number <= most[0]:
            yield (number,)
        return
    for first in (n for n in range(1, min(number, most[0]) + 1) if number % n == 0):
        for rest in _factored(number // first, most[1:]):
            yield first, *rest


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────
def attached(devices: Sequence[jax.Device]) -> Topology:
    """The slices that these devices are. Raises `ConfigError` for a machine of whose links and memory nothing is known here."""
    chip = chips.of_kind(devices[0].device_kind)
    family = next((family for family, one in TPUS.items() if one is chip), None)
    if family is None:
        raise ConfigError(
            f"knows the links and memory of {', '.join(TPUS)}, and not those of {devices[0].device_kind!r}: run it there, or give "
            "--set=mesh.fsdp=… yourself; compile --autoshard --topology=v5e:16x16 ranks meshes from any machine",
            "--autoshard",
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    first = [device for device in devices if getattr(device, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
    sides = [len({device.coords[i] for device in first}) for i in range(TPUS[family].dims)]
    if math.prod(sides) * TPUS[family].devices * slices != len(devices):
        raise ConfigError(
            f"sees {len(devices)} devices that are no whole slices: start it on all of a slice's hosts", "--autoshard"
        )
    return Topology(family, tuple(sides), slices)


def table(ranking: Ranking, tokens: int) -> Table:
    """The best of them. tokens: of a step."""
    topology = ranking.topology
    where = f"{topology.slices} × {topology.name}" if topology.slices > 1 else topology.name
    shown = Table(
        title=f"Meshes for {where}, the fastest first: {len(ranking.fitting)} of {ranking.tried} fit",
        caption="By formula; `compile` with --set=mesh.… says what the compiler makes of one.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("mesh")
    for column in ("MFU", "s a step", "tokens/s", "GiB a device", "of HBM"):
        shown.add_column(column, justify="right")
    shown.add_column("most time goes to")
    limit = topology.chip.memory / topology.chip.devices
    for one in ranking.fitting[:SHOWN]:
        rate = tokens * len(one.estimates) / one.seconds
        shown.add_row(
            one.split,
            f"{one.mfu:.1%}",
            f"{one.seconds / len(one.estimates):.3g}",
            f"{rate:,.0f}",
            f"{one.memory / GIB:.2f}",
            f"{one.memory / limit:.0%}",
            one.bound,
        )
    return shown
