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
    the other axes); data: copies of the model, each with its share of the batch;
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

    def for_population(self, members: int, devices: int) -> "Mesh":
        """This mesh with `population` worked out for so many trials: what the other axes leave free, where trials need it."""
        if self.population is not None:
            return self
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        free = devices // fixed if devices % fixed == 0 and -1 in self.sizes.values() else 1
        return replace(self, population=max(d for d in range(1, free + 1) if free % d == 0 and d <= members))

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
        """The mesh over `devices` (default: all), with compiler-propagated ("Auto") axes."""
        devices = list(devices if devices is not None else jax.devices())
        shape = self.shape(len(devices))
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        if len(devices) == len(jax.devices()):
            return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)
        return jax.sharding.Mesh(np.array(devices).reshape(tuple(shape.values())), tuple(shape), axis_types=types)
