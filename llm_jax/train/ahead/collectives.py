"""The messages of a compiled program: what kind, how many bytes, over which axes of the mesh, and whether they leave a slice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llm_jax.train.ahead.hlo import Computation, Instruction, Module

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
KINDS: dict[str, Kind] = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "all-gather",
}


@dataclass(frozen=True)
class Collective:
    """Messages alike. bytes: of one, the whole array: what is gathered, or what is summed, or what is sent; count: how many a step.

    parts: devices that take part; axes: the mesh axes they lie along; crosses: whether they lie in several slices. overlaps:
    whether the program computes something else meanwhile. label: where in the source the first of them comes from.
    """

    kind: Kind
    bytes: float
    parts: int
    axes: tuple[str, ...] = ()
    dtype: str = ""
    count: float = 1.0
    overlaps: bool = False
    crosses: bool = False
    label: str = ""

    @property
    def total(self) -> float:
        """Bytes of all of them."""
        return self.bytes * self.count

    @property
    def travels(self) -> float:
        """Bytes of one that must reach each device: of a gathered or summed array all but its own part, of a mean twice that."""
        share = 1 - 1 / self.parts
        return {"all-reduce": 2 * share, "collective-permute": 1.0, "all-to-all": share}.get(self.kind, share) * self.bytes


def of_module(module: Module, mesh: Mapping[str, int], slices: Sequence[int] = ()) -> list[Collective]:
    """Every collective of a program on a mesh (axis → devices, in order), those that are alike together.

    slices: the slice of every device, in the mesh's order; none given is one slice.
    """
    found: dict[Collective, float] = {}
    for one, times in _found(module, mesh, slices):
        found[one] = found.get(one, 0.0) + times
    together: dict[Collective, Collective] = {}
    for one, times in found.items():
        key = replace(one, label="")
        before = together.get(key)
        together[key] = (
            replace(one, count=times, label=one.label) if before is None else replace(before, count=before.count + times)
        )
    return sorted(together.values(), key=lambda one: -one.total)


def _found(module: Module, mesh: Mapping[str, int], slices: Sequence[int]):
    for name, times in module.calls.items():
        for one in module.computations[name]:
            if one.opcode == "send" and (said := re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)):
                yield _between(module.computations[name], one, said[1], mesh, slices), times
        for one in module.computations[name]:
            for inside, instruction, label in _sending(module, module.computations[name], one):
                chain = re.search(r'chain_id="(\d+)"', instruction.rest)
                if chain and not inside.has("AsyncCollectiveStart"):
                    continue  # a message in steps: each has it written out, and the first one counts
                described = replace(_described(inside, instruction, mesh, slices), label=label)
                if described.parts > 1:
                    meanwhile = described.overlaps or chain is not None or name in module.aside
                    yield replace(described, overlaps=meanwhile), times


def _sending(module: Module, computation: Computation, one: Instruction) -> list[tuple[Computation, Instruction, str]]:
    """The collectives that an instruction is, or, if it is a fusion, has inside, and where they come from."""
    if one.opcode.removesuffix("-start") in KINDS:
        return [(computation, one, one.label)]
    if one.opcode not in ("fusion", "custom-call"):
        return []
    called = [*one.called.get("calls", []), *one.called.get("called_computations", [])]  # the latter: of another core's
    inside = [module.computations[name] for name in called if name in module.computations]
    found = [sending for each in inside for other in each for sending in _sending(module, each, other)]
    return [(where, each, one.label if label == each.name else label) for where, each, label in found]


def _between(computation: Computation, one: Instruction, said: str, mesh: Mapping[str, int], slices: Sequence[int]) -> Collective:
    """What each chip sends over the network for its own part of an array that is summed or gathered over slices."""
    kind, parts = KINDS.get(said.lower().replace("_", "-"), "collective-permute"), max(len(set(slices)), 2)
    of = np.reshape(slices, tuple(mesh.values())) if len(slices) else np.zeros(tuple(mesh.values()))
    axes = tuple(axis for place, axis in enumerate(mesh) if (of != of.take([0], place)).any())
    sent = [array for operand in computation.operands(one) for array in operand.arrays if array.dtype != "token"]
    size = sum(array.bytes for array in sent) * (parts if kind == "all-gather" else 1)
    return Collective(kind, size, parts, axes, sent[0].dtype if sent else "", overlaps=True, crosses=True, label=one.label)


def _described(computation: Computation, one: Instruction, mesh: Mapping[str, int], slices: Sequence[int]) -> Collective:
    kind, group = KINDS[one.opcode.removesuffix("-start")], members(one.rest, math.prod(mesh.values()))
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as TPUs have it: a sum of which each keeps its part
    sent = [array for operand in computation.operands(one) for array in operand.arrays]
    if one.opcode.startswith("ragged-all-to-all"):  # of rows, into room for as many or more, or back
        sent = [min(sent[:2], key=lambda array: array.bytes)]
    size = sum(array.bytes for array in sent) * (len(group) if kind == "all-gather" else 1)
    places = np.unravel_index(group, tuple(mesh.values()))
    axes = tuple(axis for axis, where in zip(mesh, places, strict=True) if len(set(where.tolist())) > 1)
    parts = len(group) if kind != "collective-permute" else math.prod(mesh[axis] for axis in axes)
    largest = max(sent, key=lambda array: array.bytes, default=None)
    crosses = len({slices[member] for member in group}) > 1 if len(slices) else False
    dtype = largest.dtype if largest else ""
    begun = one.opcode.endswith("-start")
    return Collective(kind, size, parts, axes, dtype, overlaps=begun, crosses=crosses)


def members(text: str, devices: int) -> list[int]:
    """The devices of the first group of a collective, by any of the ways that XLA writes them; all where it writes none."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in listed[1].split(",")]
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        found = [[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return next((pair for pair in found if pair[0] != pair[1]), found[0])  # who keeps its own sends nothing
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        order = np.arange(devices).reshape([int(n) for n in iota[3].split(",")])
        order = order.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else order
        return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text
    ):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = np.arange(math.prod(sizes.values()))
        if named[2]:
            order = order.reshape([int(n) for n in named[2].split(",")])
            order = order.transpose([int(n) for n in named[3].split(",")]) if named[3] else order
        chosen = re.findall(r"'([^']+)'", named[4])
        first = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
        return np.asarray(order.reshape(tuple(sizes.values()))[first]).ravel().tolist()
    return list(range(devices))
