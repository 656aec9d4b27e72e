"""The output layer as a value: who needs a loss alone never makes the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from llm_jax.nn.kernels.product import product


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "matrix", "bias"],
    meta_fields=["table", "multiplier", "soft_cap"],
)
@dataclass(frozen=True)
class Unembedding:
    """What logits are made of: z = multiplier · (h·W + b), and c·tanh(z / c) with a soft cap c (Gemma 2).

    hidden `[..., D]` and matrix `[D, V]`, or `[V, D]` of a table, in the compute dtype; bias `[V]` float32, or None.
    """

    hidden: jax.Array
    matrix: jax.Array
    bias: jax.Array | None = None
    table: bool = False
    multiplier: float = 1.0
    soft_cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Token ids."""
        return self.matrix.shape[0 if self.table else 1]

    def logits(self) -> jax.Array:
        """`[..., V]` float32 (float64 if that is the compute dtype)."""
        kernel_DV = self.matrix.T if self.table else self.matrix
        logits = product(self.hidden, kernel_DV, result=jnp.promote_types(self.hidden.dtype, jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias.reshape((1,) * (logits.ndim - 1) + self.bias.shape)
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)
