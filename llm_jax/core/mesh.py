"""The named device mesh: which axis gets how many devices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils

from llm_jax.core.config import Config, ConfigError, require, require_positive

BATCH = "replica", "data", "fsdp", "expert", "stage"  # the axes whose devices have rows of their own
# across slices, whose network is slow, go first the axes that say least to each other
BETWEEN_SLICES = "population", "replica", "data", "stage", "fsdp", "expert", "sequence", "tensor"


@dataclass(frozen=True)
class Split(Config):
    """A rule of one's own: a logical axis (`core.sharding.RULES` lists them) is split over these mesh axes; none: not at all."""

    name: str
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mesh(Config):
    """Devices along each axis; -1 (at most once) means "the rest".

    population: independent trials of an ablation (None: as many devices as there are trials for, before the rest goes to
    the axis that takes it); stage: layers are split, and micro-batches go from stage to stage, while what is before and after the
    layers is split by rows; replica, data: copies of the model, each with its share of the batch, replicas as far from each other
    as slices are; fsdp: the batch *and* the parameters are split (ZeRO-3, Rajbhandari et al. 2020); expert: the batch and the
    experts are split, and tokens travel to theirs; sequence: tokens of a row are split, and keys and values travel; tensor: heads
    and hidden units are split. Parameters are split over sequence and expert too, as over fsdp.

    context: how keys reach the queries of other devices along sequence, all at once or round in a ring, which needs less memory and
    more time. microbatches: that a device's rows go through the stages in, a multiple of stage (None: as many as stages); rounds:
    how often they go through all of them, each time through fewer layers. offload: between steps the optimizer's state and the
    average of the parameters lie in the hosts' memory. rules: exceptions from what is split over what.
    """

    population: int | None = None
    stage: int = 1
    replica: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    context: Literal["gather", "ring"] = "gather"
    microbatches: int | None = None
    rounds: int = 1
    offload: bool = False
    rules: tuple[Split, ...] = ()

    def validate(self):
        require_positive(self, "microbatches", "rounds")
        for axis, size in self.sizes.items():
            require(size == -1 or size > 0, axis, f"must be > 0, or -1 for the rest, got {size}")
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        require(
            len(rest) <= 1, rest[-1] if rest else "", f"is -1, but so is {rest[0] if rest else ''}: only one axis can take the rest"
        )
        for rule in self.rules:
            unknown = [axis for axis in rule.over if axis not in self.sizes or axis == "population"]
            require(not unknown, "rules", f"splits {rule.name!r} over {unknown}: the axes are {', '.join(list(self.sizes)[1:])}")

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → devices, in mesh order: neighbours along the last axis are the nearest."""
        names = "stage", "replica", "data", "fsdp", "expert", "sequence", "tensor"
        return {"population": self.population or 1} | {name: getattr(self, name) for name in names}

    @property
    def rows(self) -> int:
        """Devices that have rows of their own, of a mesh whose axes are worked out."""
        return math.prod(self.sizes[axis] for axis in BATCH)

    def for_population(self, members: int, devices: int, rows: int) -> "Mesh":
        """This mesh with every axis worked out for so many trials of `rows` rows a micro-batch.

        Where the population and another axis are left open, trials take the devices that the fixed axes leave, and the other axis
        as many of the rest as can share the rows; what remains is idle. Raises `ConfigError` where fixed sizes do not fit.
        """
        rest = next((axis for axis, size in self.sizes.items() if size == -1), None)
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        if self.population is not None or rest is None or devices % fixed:
            return self._with(self.shape(devices))
        free, shared = devices // fixed, math.prod(self.sizes[axis] for axis in BATCH if axis != rest)
        population = min(members, free)

        def most(room: int) -> int:  # devices of the open axis, at most `room`, that can share the rows
            return max((n for n in range(1, room + 1) if rest not in BATCH or rows % (n * shared) == 0), default=1)

        alone = most(free)  # what one trial gets: the others' share divides it, and with it every batch that is scored
        share = max(n for n in range(1, free // population + 1) if alone % n == 0)
        return self._with({"population": population, rest: share})

    def _with(self, sizes: Mapping[str, int]) -> "Mesh":
        return replace(self, **sizes)  # type: ignore[arg-type]

    def shape(self, devices: int) -> dict[str, int]:
        """Axis → devices with -1 worked out. Raises `ConfigError` where they do not multiply to `devices`."""
        sizes = dict(self.sizes)
        known = math.prod(size for size in sizes.values() if size != -1)
        wanted = " × ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "every axis 1"
        for axis, size in sizes.items():
            if size == -1:
                if devices % known:
                    divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
                    told = f"{wanted} does not divide {devices} devices: {known} is none of their divisors {divisors}"
                    raise ConfigError(told, "mesh")
                sizes[axis] = devices // known
        if math.prod(sizes.values()) != devices:
            raise ConfigError(
                f"{wanted} needs {math.prod(sizes.values())} devices, but there are {devices}: set one axis to -1", "mesh"
            )
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh with compiler-propagated ("Auto") axes, over `devices` (default: all), or their first if all sizes are given.

        Devices are placed so that the last axes are nearest; of several slices each holds a block of the first axes that divide.
        """
        every = list(devices if devices is not None else jax.devices())
        chosen = every if -1 in self.sizes.values() else every[: math.prod(self.sizes.values())]
        shape = self.shape(len(chosen))
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        placed = _placed(shape, chosen) if len(chosen) == len(every) else np.array(chosen).reshape(list(shape.values()))
        return jax.sharding.Mesh(placed, tuple(shape), axis_types=types)


def across_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """Axis → how many of its devices lie in different slices. Raises `ConfigError` where the axes do not divide into the slices."""
    across, left = dict.fromkeys(shape, 1), slices
    for axis in [axis for axis in BETWEEN_SLICES if axis in shape]:
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    if left > 1:
        told = f"cannot be divided into {slices} slices, which must all be of one form: set replica or data to {slices}"
        raise ConfigError(told, "mesh " + " × ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1))
    return across


def _placed(shape: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = across_slices(shape, slices)
        within = [size // across[axis] for axis, size in shape.items()]
        return mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(list(shape.values()), devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(list(shape.values()))
