"""What a compiled program keeps in a device's memory, by what it is for, and its largest arrays."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from llm_jax.train.ahead.hlo import Module, arrays

ACTIVATIONS, GRADIENTS, TEMPORARIES = "activations", "gradients", "temporaries"
TOGETHER = "activations, gradients, temporaries"  # where they cannot be told apart
UNITS = {"": 1.0, "B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class Largest:
    """One of the largest places in memory: its bytes, and the arrays that lie there one after another."""

    bytes: float
    what: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what they are for; largest: places of what a step needs beside its arguments.

    Activations are what the forward pass has made, the first time or again, and is there when most is; gradients what the backward
    pass has; temporaries the rest: weights in the compute dtype, what is sent and received, and gaps between places. What lies in
    the chip's own memory beside the arithmetic is not counted, as all of a tiny model may.
    """

    parts: Mapping[str, float]
    largest: tuple[Largest, ...] = ()

    @property
    def working(self) -> float:
        """Of what a step needs beside its arguments and results; infinite where that is not known."""
        known = [self.parts[name] for name in (ACTIVATIONS, GRADIENTS, TEMPORARIES, TOGETHER) if name in self.parts]
        return sum(known) if known else math.inf

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def on_device(tree: Any) -> float:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s with shardings that lie on one device, without padding."""

    def size(leaf: Any) -> float:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8.0

    return sum(map(size, jax.tree.leaves(tree)))


def of_program(stats: Any, given: Mapping[str, float], report: str = "", peak: Mapping[str, float] | None = None) -> Memory:
    """The memory of a program from XLA's `memory_analysis()`, or, where it did not fit and there is none, from the report alone.

    given: bytes of its arguments by what they are; report: XLA's memory-usage report; peak: from `at_peak`.
    """
    if stats is None:
        end = max((place.end for place in _places(report)), default=math.nan)
        return Memory(dict(given) | {TOGETHER: end}, largest(report))
    temporary, peak = float(stats.temp_size_in_bytes), peak or {}
    parts = {
        "padding": max(stats.argument_size_in_bytes - sum(given.values()), 0.0),
        **peak,
        TEMPORARIES if peak else TOGETHER: max(temporary - sum(peak.values()), 0.0),
        "output": max(float(stats.output_size_in_bytes - stats.alias_size_in_bytes), 0.0),
        "program": float(stats.generated_code_size_in_bytes),
    }
    return Memory(dict(given) | {name: value for name, value in parts.items() if value}, largest(report))


def at_peak(assignment: str, ranges: str, module: Module) -> dict[str, float]:
    """Bytes of activations and gradients at the moment when most of the temporary memory is in use.

    assignment, ranges: XLA's dumps of where every value lies, and from when to when. Empty where they name no such values.
    """
    block = re.search(r"^allocation \d+: size \d+, preallocated-temp:\n((?: value: .*\n)*)", assignment, re.MULTILINE)
    value = r"<\d+ ([\w.\-]+)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)"
    found = re.findall(value, block[1] if block else "")
    places = {name + (index or "{}"): (int(offset), int(size)) for name, index, size, offset in found}
    begun, ended = defaultdict(list), defaultdict(list)
    for name, start, end in re.findall(r"^ +([\w.\-]+\{[\d,]*\}):(\d+)-(\d+)$", ranges, re.MULTILINE):
        if name in places:
            begun[int(start)].append(name)
            ended[int(end) + 1].append(name)
    purposes = _purposes(module)
    live: dict[str, None] = {}
    most: dict[int, list[str]] = {}
    size = 0
    for time in sorted({*begun, *ended}):
        live = {name: None for name in live if name not in ended[time]} | dict.fromkeys(begun[time])
        now = defaultdict(list)  # one place may have several names
        for name in live:
            now[places[name][0]].append(name)
        total = sum(max(places[name][1] for name in names) for names in now.values())
        if total > size:
            size, most = total, now
    parts = {ACTIVATIONS: 0.0, GRADIENTS: 0.0}
    for names in most.values():
        kinds = {purposes.get(name.partition("{")[0], TEMPORARIES) for name in names} - {TEMPORARIES}
        for kind in sorted(kinds)[-1:]:
            parts[kind] += max(places[name][1] for name in names)
    return parts if most else {}


def _purposes(module: Module) -> dict[str, str]:
    """What values are for, by JAX's names of their sources: `transpose(jvp(…))` is backward, with what is computed again inside,
    and `gradient` what a loss by blocks has made of it already. What a loop carries is as the loop is."""
    every = [(each.name, one) for each in module.computations.values() for one in each]
    loops = {one.called["body"][0]: one.label for _, one in every if one.opcode == "while"}
    return {one.name: _purpose(one.name, loops.get(of, "") if one.opcode == "parameter" else one.label) for of, one in every}


def _purpose(name: str, label: str) -> str:
    if "jvp(" not in label or name.startswith(("all-gather", "async-collective", "collective-permute")):
        return TEMPORARIES
    back = "transpose(" in label and "rematted_computation" not in label
    return GRADIENTS if back or "/gradient/" in label else ACTIVATIONS


def largest(report: str, count: int = 8) -> tuple[Largest, ...]:
    """The largest places that XLA's memory-usage report names."""
    found = (Largest(place.bytes, _shapes(place.arrays)) for place in _places(report))
    return tuple(sorted(found, key=lambda one: -one.bytes)[:count])


class _Place(NamedTuple):
    """Of what is temporary; the report's own total counts some that overlap twice, and the last one's end does not."""

    bytes: float
    end: float
    arrays: str


def _places(report: str) -> Iterator[_Place]:
    for line in re.split(r"\nMemory Space: ", report)[0].splitlines():  # the first is HBM
        fields = re.match(r"\s*[\d.]+\w*\(\s*\d+%\);\s*([\d.]+)\s*([KMGT]?)i?B;\s*(\d+);\s*\d+;\s*(.*)$", line)
        if fields:
            size = float(fields[1]) * UNITS[fields[2]]
            yield _Place(size, int(fields[3]) + size, fields[4])


def _shapes(text: str, most: int = 3) -> str:
    """The first arrays of a list, the largest first; what shares their place but is smaller says nothing."""
    seen = dict.fromkeys(
        f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in sorted(arrays(text), key=lambda array: -array.bytes)
    )
    names = list(seen)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
