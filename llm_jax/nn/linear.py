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
from llm_jax.nn.kernels.product import product


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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights()
        y = product(x.astype(self.dtype), kernel, contract=len(self.inputs))
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias in the compute dtype."""
        init = partitioned(normal(self.gain / math.sqrt(math.prod(self.inputs))), self.axes)
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs), jnp.float32)
        if not self.bias:
            return kernel.astype(self.dtype), None
        bias = self.param("bias", partitioned(nn.initializers.zeros, self.axes[len(self.inputs) :]), self.outputs, jnp.float32)
        return kernel.astype(self.dtype), bias.astype(self.dtype)
