"""How a branch joins the residual stream; "none" is a real choice (He et al. 2016 is what it tests)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require_positive
from llm_jax.core.sharding import partitioned
from llm_jax.nn.kernels.product import widened

Parameter = Callable[..., jax.Array]  # (name, shape, initial value) -> array of rank of the shape
Write = Callable[[jax.Array], jax.Array]  # the branch's result [B, L, D] -> the stream after it


@dataclass(frozen=True)
class Residual(Config):
    """x + branch."""

    streams = 1  # copies of the residual stream

    def parameters(self, width: int) -> int:
        """Trainable scalars of one connection."""
        return 0

    def shrinkage(self, depth: int) -> float:
        """By what the last matrix of a branch is drawn smaller: the stream sums 2·depth branches. Radford et al. 2019."""
        return 1 / math.sqrt(2 * depth)

    def open(self, x_BLD: jax.Array) -> jax.Array:
        """The stream that the first layer sees."""
        return x_BLD

    def close(self, x: jax.Array) -> jax.Array:
        """`[B, L, D]`: what leaves the last layer."""
        return x

    def connect(self, x: jax.Array, *, depth: int, place: jax.Array, parameter: Parameter) -> tuple[jax.Array, Write]:
        """What the branch sees, `[B, L, D]`, and how its result is written back.

        depth: layers of the model; place: how many branches came before, a traced integer.
        """
        return x, lambda branch: x + branch


@dataclass(frozen=True)
class NoResidual(Residual):
    """The branch alone."""

    def shrinkage(self, depth):
        return 1.0  # nothing is summed

    def connect(self, x, *, depth, place, parameter):
        return x, lambda branch: branch


@dataclass(frozen=True)
class Scaled(Residual):
    """x + branch / √(2·depth), so that the stream's variance does not grow with depth; `learned` makes it a start value."""

    learned: bool = False

    def shrinkage(self, depth):
        return 1.0  # the factor is in the sum

    def parameters(self, width):
        return int(self.learned)

    def connect(self, x, *, depth, place, parameter):
        factor = 1 / math.sqrt(2 * depth)
        scale = _scalar(parameter, factor, x) if self.learned else factor
        return x, lambda branch: x + branch * scale


@dataclass(frozen=True)
class ReZero(Residual):
    """x + α·branch with a learned α that starts at 0. Bachlechner et al. 2020."""

    def parameters(self, width):
        return 1

    def shrinkage(self, depth):
        return 1.0

    def connect(self, x, *, depth, place, parameter):
        scale = _scalar(parameter, 0.0, x)
        return x, lambda branch: x + branch * scale


def _scalar(parameter: Parameter, value: float, x: jax.Array) -> jax.Array:
    return parameter("scale", (1,), value).reshape((1,) * x.ndim).astype(x.dtype)


@dataclass(frozen=True)
class HyperConnections(Residual):
    """n copies of the stream: a branch reads one mixture of them, adds its result to each by a weight, and mixes them.

    With H `[n, D]`: the branch sees αᵀH and H becomes β·branch + MᵀH (Zhu et al. 2025, "Hyper-Connections", eq. 2–5). All start
    so that every branch reads one copy in turn and adds to all: each copy is the plain residual. Their sum leaves the last layer
    (ibid., algorithm 1), n times the plain stream, which a final norm does not see. dynamic: α, β and M also depend on H, by tanh
    of a projection of the normalized copies (ibid., eq. 10–13).
    """

    rate: int = 4
    dynamic: bool = True

    def validate(self):
        require_positive(self, "rate")

    @property
    def streams(self):  # type: ignore[override]
        return self.rate

    def parameters(self, width):
        n = self.rate
        return n * (n + 2) + (n * width + 2 * width + 2 if self.dynamic else 0)

    def open(self, x_BLD):
        return jnp.repeat(x_BLD[:, :, None], self.rate, 2)

    def close(self, x):
        return x.sum(2)

    def connect(self, x, *, depth, place, parameter):
        n, width, h = self.rate, x.shape[-1], widened(x)
        read = parameter("read", (n, 1), jax.nn.one_hot(place % n, n)[:, None])
        mix = parameter("mix", (n, n), jnp.eye(n))
        write = parameter("write", (n, 1), 1.0)
        read, mix, write = (m.reshape(1, 1, *m.shape) for m in (read, mix, write))
        if self.dynamic:
            normal = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
            project = lambda name, columns: jnp.tanh(normal @ parameter(name, (width, columns), 0.0))  # noqa: E731
            into, back = (parameter(name, (1,), 0.01).reshape(1, 1, 1, 1) for name in ("scale_in", "scale_out"))
            read = read + into * project("read_kernel", 1)
            mix = mix + into * project("mix_kernel", n)
            write = write + back * project("write_kernel", 1)
        kept = jnp.einsum("blnm,blnd->blmd", jnp.broadcast_to(mix, (*h.shape[:2], n, n)), h)
        seen = (read * h).sum(2).astype(x.dtype)
        return seen, lambda branch: (kept + write * branch.astype(h.dtype)[:, :, None]).astype(x.dtype)


class Connection(nn.Module):
    """A residual connection with what it learns."""

    config: Residual
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, place: jax.Array) -> tuple[jax.Array, Write]:
        def parameter(name: str, shape: tuple[int, ...], value) -> jax.Array:
            init = lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)  # noqa: E731
            return self.param(name, partitioned(init, (None,) * len(shape)), shape, jnp.float32)

        return self.config.connect(x, depth=self.depth, place=place, parameter=parameter)
