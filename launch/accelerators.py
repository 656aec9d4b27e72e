"""TPU slices as they are called by Cloud TPU and by GKE; `v5e:16x16` is a chip and how its slice is laid out.

Sources: Google Cloud's pages "TPU versions", "TPU software versions" and "Plan TPUs in GKE".
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from launch.command import LaunchError


@dataclass(frozen=True)
class Chip:
    """A generation: its names, the cores that its names count for a chip, the axes of its topologies, its VM image for JAX."""

    vm: str
    gke: str
    cores: int
    axes: int
    image: str | None  # None: not to be had through the Cloud TPU API


CHIPS = {
    "v4": Chip("v4", "tpu-v4-podslice", 2, 3, "tpu-ubuntu2204-base"),
    "v5e": Chip("v5litepod", "tpu-v5-lite-podslice", 1, 2, "v2-alpha-tpuv5-lite"),
    "v5p": Chip("v5p", "tpu-v5p-slice", 2, 3, "v2-alpha-tpuv5"),
    "v6e": Chip("v6e", "tpu-v6e-slice", 1, 2, "v2-alpha-tpuv6e"),
    "tpu7x": Chip("tpu7x", "tpu7x", 2, 3, None),
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
    """A slice from `v5e:16x16`. Raises `LaunchError` for a chip that is not known, or a topology that is none of its."""
    name, _, topology = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1, 0.5)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise LaunchError(
            f"--topology={text}: no TPU {name!r}{meant}: write CHIP:TOPOLOGY with one of {', '.join(CHIPS)}, as in v5e:16x16"
        )
    axes = CHIPS[name].axes
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != axes - 1:
        example = {2: "16x16", 3: "4x4x8"}[axes]
        raise LaunchError(f"--topology={text}: slices of {name} have {axes} axes, as in {name}:{example}")
    return Slice(CHIPS[name], topology)
