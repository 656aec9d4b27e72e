"""The one place where a weight matrix is made: its initialisation, logical axes and compute dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config
from llm_jax.core.sharding import partitioned
from llm_jax.nn.kernels.product import products


@dataclass(frozen=True)
class Precision(Config):
    """Dtype of activations and of the operands of products; parameters and optimizer state are always float32."""

    compute: Literal["float32", "bfloat16"] = "float32"

    @property
    def dtype(self) -> Any:
        """The compute dtype as jax.numpy's."""
        return jnp.dtype(self.compute)


def normal(scale: float):
    """Initializer: normal with standard deviation `scale`."""
    return nn.initializers.normal(scale)


class Linear(nn.Module):
    """`[..., *inputs] -> [..., *outputs]` through a kernel `[*inputs, *outputs]`.

    axes: the logical name of every kernel dimension. gain: the kernel is drawn with deviation gain / √(fan in), so that
    it keeps the variance of its input at gain 1 (LeCun et al. 1998).
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    gain: float = 1.0
    bias: bool = False
    dtype: Any = jnp.float32

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self)[0]

    @nn.compact
    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias in the compute dtype."""
        init = partitioned(normal(self.gain / math.sqrt(math.prod(self.inputs))), self.axes)
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs), jnp.float32)
        if not self.bias:
            return kernel.astype(self.dtype), None
        bias = self.param("bias", partitioned(nn.initializers.zeros, self.axes[len(self.inputs) :]), self.outputs, jnp.float32)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


def project(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """`x` through each of several `Linear`s of the same inputs."""
    kernels, biases = zip(*(linear.weights() for linear in linears), strict=True)
    ys = products(x.astype(linears[0].dtype), kernels, contract=len(linears[0].inputs))
    return [
        y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        for y, bias in zip(ys, biases, strict=True)
    ]
