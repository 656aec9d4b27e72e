"""The named device mesh: which axis gets how many devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from llm_jax.core.config import Config, ConfigError, require


@dataclass(frozen=True)
class Mesh(Config):
    """Devices along each axis; -1 (at most once) means "the rest".

    population: independent trials of an ablation (None: as many devices as there are trials for, before the rest goes to
    the axis that takes it); data: copies of the model, each with its share of the batch;
    fsdp: the batch *and* the parameters are split (ZeRO-3); tensor: heads and hidden units are split.
    """

    population: int | None = None
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self):
        for axis, size in self.sizes.items():
            require(size == -1 or size > 0, axis, f"must be > 0, or -1 for the rest, got {size}")
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        require(
            len(rest) <= 1, rest[-1] if rest else "", f"is -1, but so is {rest[0] if rest else ''}: only one axis can take the rest"
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → devices, in mesh order."""
        return {"population": self.population or 1, "data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def for_population(self, members: int, devices: int, rows: int) -> "Mesh":
        """This mesh with every axis worked out for so many trials of `rows` rows a micro-batch.

        Where the population and another axis are left open, trials take the devices that the fixed axes leave, and the other axis
        as many of the rest as can share the rows; what remains is idle. Raises `ConfigError` where fixed sizes do not fit.
        """
        rest = next((axis for axis, size in self.sizes.items() if size == -1), None)
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        if self.population is not None or rest is None or devices % fixed:
            return replace(self, **self.shape(devices))
        free, shared = devices // fixed, {"data": self.fsdp, "fsdp": self.data}.get(rest)
        population = min(members, free)

        def most(room: int) -> int:  # devices of the open axis, at most `room`, that can share the rows
            return max((n for n in range(1, room + 1) if shared is None or rows % (n * shared) == 0), default=1)

        alone = most(free)  # what one trial gets: the others' share divides it, and with it every batch that is scored
        share = max(n for n in range(1, free // population + 1) if alone % n == 0)
        return replace(self, population=population, **{rest: share})

    def shape(self, devices: int) -> dict[str, int]:
        """Axis → devices with -1 worked out. Raises `ConfigError` where they do not multiply to `devices`."""
        sizes = dict(self.sizes)
        known = math.prod(size for size in sizes.values() if size != -1)
        wanted = " × ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "every axis 1"
        for axis, size in sizes.items():
            if size == -1:
                if devices % known:
                    raise ConfigError(f"{wanted} does not divide {devices} devices: {known} is no divisor of {devices}", "mesh")
                sizes[axis] = devices // known
        if math.prod(sizes.values()) != devices:
            raise ConfigError(
                f"{wanted} needs {math.prod(sizes.values())} devices, but there are {devices}: set one axis to -1", "mesh"
            )
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh with compiler-propagated ("Auto") axes, over `devices` (default: all), or their first if all sizes are given."""
        devices = list(devices if devices is not None else jax.devices())
        if -1 not in self.sizes.values():
            devices = devices[: math.prod(self.sizes.values())]
        shape = self.shape(len(devices))
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        if len(devices) == len(jax.devices()):
            return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)
        return jax.sharding.Mesh(np.array(devices).reshape(tuple(shape.values())), tuple(shape), axis_types=types)
