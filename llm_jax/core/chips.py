"""What the accelerators are that programs run on or are compiled for: memory, speeds, links, and the slices that exist.

Sources: Google's pages of the TPUs' architecture (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x); NVIDIA's data sheets.
Memory is what the compiler lets a program have, which is the data sheet's less a reserve (libtpu 0.0.52 names it in its errors).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llm_jax.core.config import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip, of which JAX sees `devices` (v7x: its two halves); all other numbers are of the whole chip.

    kinds: prefixes of `Device.device_kind`. memory: bytes that programs may use. flops: bf16 products, FLOP/s; bandwidth: of the
    memory, bytes/s. link: of one link of the torus, bytes/s in one direction; each of `dims` dimensions has two. network: to other
    slices, bytes/s. tile: rows of the matrix unit. wraps: chips of a dimension from which on its two ends are linked. matmul:
    share of `flops` that large products reach. libtpu: flags with which messages are sent while something is computed, where that
    is not so without.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    dims: int = 0
    network: float = 0.0
    tile: int = 128
    devices: int = 1
    wraps: int = 4
    largest: tuple[int, ...] = ()
    matmul: float = 0.93
    libtpu: tuple[str, ...] = ()

    def slices(self) -> list[tuple[int, ...]]:
        """The shapes of slices that can be had, the smallest first."""
        if self.dims == 2:
            return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
        below: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
        a, b, c = (range(4, most + 1, 4) for most in self.largest)
        cubes = [(i, j, k) for i in a for j in b for k in c if i <= j <= k]
        return below + sorted(cubes, key=math.prod)


# the sparse cores gather and scatter while the matrix units compute; v5e's own way to do so is on by default
SPARSE_CORES = tuple(
    f"--xla_tpu_enable_sparse_core_collective_offload_{kind}=true" for kind in ("all_gather", "reduce_scatter", "all_reduce")
)
# v4's network: a host's 100 Gbit/s over its 4 chips, which is not published; the others' as the pages give it for a chip
TPUS = {
    "v4": Chip("TPU v4", ("TPU v4",), 275e12, 30.75 * GIB, 1.228e12, 50e9, 3, 3.125e9, largest=(12, 16, 16)),
    "v5e": Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.819e12, 50e9, 2, 3.125e9, wraps=16),
    "v5p": Chip("TPU v5p", ("TPU v5",), 459e12, 95.73 * GIB, 2.765e12, 100e9, 3, 6.25e9, largest=(16, 16, 24), libtpu=SPARSE_CORES),
    "v6e": Chip(
        "TPU v6e", ("TPU v6",), 918e12, 31.24 * GIB, 1.638e12, 100e9, 2, 12.5e9, tile=256, wraps=16, matmul=0.8, libtpu=SPARSE_CORES
    ),
    "tpu7x": Chip(
        "TPU7x",
        ("TPU7x", "TPU v7"),
        2307e12,
        189.48 * GIB,
        7.38e12,
        100e9,
        3,
        12.5e9,
        256,
        2,
        largest=(16, 16, 36),
        matmul=0.8,
        libtpu=SPARSE_CORES,
    ),
}
GPUS = (
    Chip("NVIDIA A100", ("NVIDIA A100",), 312e12),
    Chip("NVIDIA H100", ("NVIDIA H100",), 989e12),
    Chip("NVIDIA H200", ("NVIDIA H200",), 989e12),
    Chip("NVIDIA B200", ("NVIDIA B200",), 2250e12),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a `Device.device_kind`, if it is known; the longest prefix wins ("TPU v5 lite" is no "TPU v5")."""
    known = {kind: chip for chip in (*TPUS.values(), *GPUS) for kind in chip.kinds}
    found = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(found, key=len)] if found else None


def of_accelerator(name: str) -> Chip | None:
    """The chip of a slice by what Cloud TPU calls it in `TPU_ACCELERATOR_TYPE`: v4-8, v5litepod-16, v5p-512, v6e-256."""
    family = name.partition("-")[0]
    return TPUS.get({"v5litepod": "v5e"}.get(family, family))


@dataclass(frozen=True)
class Topology:
    """Slices of TPUs, as `v5e:16x16`: `slices` of them, each a torus of `shape` chips."""

    family: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Its kind of chip."""
        return TPUS[self.family]

    @property
    def name(self) -> str:
        """As it is typed, and as libtpu knows it."""
        return f"{self.family}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    def bandwidth(self, parts: int) -> float:
        """Bytes/s that reach a chip, from all sides, in a ring over so many chips of a slice.

        They lie along the longest dimensions that they fill, a dimension whose ends are linked is read from both sides; fewer than
        one dimension's have no link between their ends.
        """
        total, left = 0.0, parts
        for side in sorted(self.shape, reverse=True):
            if left <= 1:
                break
            whole = left >= side and side > 1
            total += self.chip.link * (2 if whole and side >= self.chip.wraps else 1) * (side > 1)
            left = -(-left // side)
        return total or self.chip.link

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Topology:
        """Of `v5e:16x16`. Raises `ConfigError` for one that does not exist, with those nearest to it."""
        family, _, sizes = text.strip().partition(":")
        if family not in TPUS:
            raise ConfigError(
                f"is of no TPU known here: did you mean {nearest(family, list(TPUS))}? Write it as v5e:16x16",
                "--topology=" + text,
            )
        chip = TPUS[family]
        asked = tuple(int(n) for n in sizes.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
        if asked not in chip.slices():
            near = [f"{family}:{'x'.join(map(str, shape))}" for shape in _near(chip, asked)]
            raise ConfigError(f"does not exist: the nearest are {', '.join(near)}", "--topology=" + text)
        if slices < 1:
            raise ConfigError(f"must be >= 1, got {slices}", "--slices")
        return cls(family, asked, slices)


def _near(chip: Chip, asked: tuple[int, ...], count: int = 3) -> list[tuple[int, ...]]:
    """The shapes nearest to what was asked for, in the logarithms of chips and sides."""

    def distance(shape: tuple[int, ...]) -> float:
        wanted = [max(n, 1) for n in asked] or [4] * chip.dims
        sides = zip(sorted(shape)[-len(wanted) :], sorted(wanted)[-len(shape) :], strict=False)
        chips = abs(math.log(math.prod(shape) / math.prod(wanted)))
        return chips + (sum(abs(math.log(a / b)) for a, b in sides) if len(wanted) == len(shape) else 0.0)

    return sorted(chip.slices(), key=distance)[:count]
