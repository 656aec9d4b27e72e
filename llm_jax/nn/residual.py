"""How a branch joins the residual stream; "none" is a real choice (He et al. 2016 is what it tests)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config
from llm_jax.core.sharding import partitioned


@dataclass(frozen=True)
class Residual(Config):
    """x + branch."""

    def parameters(self) -> int:
        """Trainable scalars of one connection."""
        return 0

    def shrinkage(self, depth: int) -> float:
        """By what the last matrix of a branch is drawn smaller: the stream sums 2·depth branches. Radford et al. 2019."""
        return 1 / math.sqrt(2 * depth)

    def join(self, x: jax.Array, branch: jax.Array, *, depth: int, gain: Callable[[float], jax.Array]) -> jax.Array:
        """`[B, L, D]` twice to once. depth: layers of the model; gain: makes a learned scalar with that initial value."""
        return x + branch


@dataclass(frozen=True)
class NoResidual(Residual):
    """The branch alone."""

    def shrinkage(self, depth):
        return 1.0  # nothing is summed

    def join(self, x, branch, *, depth, gain):
        return branch


@dataclass(frozen=True)
class Scaled(Residual):
    """x + branch / √(2·depth), so that the stream's variance does not grow with depth; `learned` makes it a start value."""

    learned: bool = False

    def shrinkage(self, depth):
        return 1.0  # the factor is in the sum

    def parameters(self):
        return int(self.learned)

    def join(self, x, branch, *, depth, gain):
        factor = 1 / math.sqrt(2 * depth)
        return x + branch * (gain(factor).astype(x.dtype) if self.learned else factor)


@dataclass(frozen=True)
class ReZero(Residual):
    """x + α·branch with a learned α that starts at 0. Bachlechner et al. 2020."""

    def parameters(self):
        return 1

    def shrinkage(self, depth):
        return 1.0

    def join(self, x, branch, *, depth, gain):
        return x + branch * gain(0.0).astype(x.dtype)


class Join(nn.Module):
    """A residual connection with its learned scalar, if it has one."""

    config: Residual
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, branch: jax.Array) -> jax.Array:
        def gain(value: float) -> jax.Array:
            return self.param("scale", partitioned(nn.initializers.constant(value), (None,)), (1,), jnp.float32).reshape(
                (1,) * x.ndim
            )

        return self.config.join(x, branch, depth=self.depth, gain=gain)
