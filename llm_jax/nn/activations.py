"""Activation functions by name; each maps `[...] -> [...]` elementwise."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["identity", "relu", "squared_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "relu": lambda x: jnp.maximum(x, 0),
    "squared_relu": lambda x: jnp.square(jnp.maximum(x, 0)),  # So et al. 2021, Primer
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # x·Φ(x), Hendrycks & Gimpel 2016
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
