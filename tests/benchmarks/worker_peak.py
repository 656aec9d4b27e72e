"""A worker whose unit is one f32 product of 2048 × 2048 matrices: `python worker_peak.py numpy|jax|torch`."""

import sys

from harness import requests

SIZE = 2048


def numpy_product():
    """NumPy's."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    return lambda: a @ a


def jax_product():
    """XLA's, on one device with all cores."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a).block_until_ready()


def torch_product():
    """PyTorch's."""
    import torch

    a = torch.randn(SIZE, SIZE)
    return lambda: a @ a


def main(library: str) -> None:
    """Serves products until the input ends."""
    product = {"numpy": numpy_product, "jax": jax_product, "torch": torch_product}[library]()
    for _ in range(3):
        product()
    for count in requests(unit=2 * SIZE**3):
        for _ in range(count):
            product()


if __name__ == "__main__":
    main(sys.argv[1])
