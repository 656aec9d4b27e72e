"""TPU slices as they are called by Cloud TPU and by GKE; `v5e:16x16` is a chip and how its slice is laid out.

Sources: Google Cloud's pages "TPU versions", "TPU software versions" and "Plan TPUs in GKE".
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from dataclasses import dataclass

from launch.command import LaunchError


@dataclass(frozen=True)
class Chip:
    """A generation: its names, the cores that its names count for a chip, the largest of its topologies, its VM image for JAX."""

    vm: str
    gke: str
    cores: int
    largest: tuple[int, ...]
    image: str | None  # None: not to be had through the Cloud TPU API

    @property
    def axes(self) -> int:
        """Of its topologies."""
        return len(self.largest)

    def topologies(self) -> list[tuple[int, ...]]:
        """All that there are, the smallest first: rectangles of powers of two, or boxes whose sides are multiples of four."""
        if self.axes == 2:
            return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
        small: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
        boxes = [box for box in itertools.product(*(range(4, most + 1, 4) for most in self.largest)) if [*box] == sorted(box)]
        return small + sorted(boxes, key=math.prod)


CHIPS = {
    "v4": Chip("v4", "tpu-v4-podslice", 2, (12, 16, 16), "tpu-ubuntu2204-base"),
    "v5e": Chip("v5litepod", "tpu-v5-lite-podslice", 1, (16, 16), "v2-alpha-tpuv5-lite"),
    "v5p": Chip("v5p", "tpu-v5p-slice", 2, (16, 16, 24), "v2-alpha-tpuv5"),
    "v6e": Chip("v6e", "tpu-v6e-slice", 1, (16, 16), "v2-alpha-tpuv6e"),
    "tpu7x": Chip("tpu7x", "tpu7x", 2, (16, 16, 36), None),
}


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together."""

    chip: Chip
    topology: str

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(int(size) for size in self.topology.split("x"))

    @property
    def type(self) -> str:
        """The accelerator type, as in v5litepod-256 or v5p-512: the number is of cores, two of which make a chip of some."""
        return f"{self.chip.vm}-{self.chips * self.chip.cores}"

    @property
    def hosts(self) -> int:
        """Hosts as Cloud TPU makes them: one for up to eight chips of two axes, and else one for each four chips."""
        return 1 if self.chip.axes == 2 and self.chips <= 8 else -(-self.chips // 4)

    @property
    def single(self) -> str:
        """A slice of such chips that is one host of four, wherever it is."""
        name = next(name for name, chip in CHIPS.items() if chip is self.chip)
        return f"{name}:{'2x2' if self.chip.axes == 2 else '2x2x1'}"

    def nodes(self, chips_per_node: int | None) -> tuple[int, int]:
        """Hosts as GKE makes them, and chips of each: four, but for a single chip, unless said otherwise. Raises `LaunchError`."""
        each = chips_per_node or min(4, self.chips)
        if self.chips % each:
            raise LaunchError(
                f"{self.topology} has {self.chips} chips, which nodes of {each} do not make up: change --chips_per_node"
            )
        return self.chips // each, each


def parse(text: str) -> Slice:
    """A slice from `v5e:16x16`. Raises `LaunchError` for a chip that is not known, or a topology that it does not come in."""
    name, _, topology = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1, 0.5)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise LaunchError(
            f"--topology={text}: no TPU {name!r}{meant}: write CHIP:TOPOLOGY with one of {', '.join(CHIPS)}, as in v5e:16x16"
        )
    chip, axes = CHIPS[name], CHIPS[name].axes
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != axes - 1:
        example = {2: "16x16", 3: "4x4x8"}[axes]
        raise LaunchError(f"--topology={text}: slices of {name} have {axes} axes, as in {name}:{example}")
    asked = tuple(int(size) for size in topology.split("x"))
    if asked not in chip.topologies():
        known = ", ".join(f"{name}:{'x'.join(map(str, sizes))}" for sizes in _near(chip, asked))
        raise LaunchError(f"--topology={text} does not exist: the nearest are {known}")
    return Slice(chip, topology)


def _near(chip: Chip, asked: tuple[int, ...], count: int = 3) -> list[tuple[int, ...]]:
    """The topologies nearest to what was asked for, in the logarithms of chips and sides."""

    def distance(sizes: tuple[int, ...]) -> float:
        sides = zip(sorted(sizes), sorted(asked), strict=True)
        return abs(math.log(math.prod(sizes) / math.prod(asked))) + sum(abs(math.log(a / b)) for a, b in sides)

    return sorted(chip.topologies(), key=distance)[:count]
