"""A worker whose unit is one product of square matrices: `python worker_peak.py numpy|jax|torch float32|bfloat16`.

2048 wide on a CPU, 8192 on a GPU, where eight are asked for before the last is waited for.
"""

import sys
from collections.abc import Callable

from harness import requests

ON_CPU, ON_GPU = (2048, 1), (8192, 8)  # width, products in a unit


def numpy_product(compute: str) -> tuple[Callable[[], object], tuple[int, int]]:
    """NumPy's."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((ON_CPU[0],) * 2, compute)
    return lambda: a @ a, ON_CPU


def jax_product(compute: str) -> tuple[Callable[[], object], tuple[int, int]]:
    """XLA's, on one device with all cores."""
    import jax
    import jax.numpy as jnp

    size, times = ON_GPU if jax.default_backend() == "gpu" else ON_CPU
    a = jax.random.normal(jax.random.key(0), (size, size), compute)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready([product(a, a) for _ in range(times)]), (size, times)


def torch_product(compute: str) -> tuple[Callable[[], object], tuple[int, int]]:
    """PyTorch's."""
    import torch

    device, (size, times) = ("cuda", ON_GPU) if torch.cuda.is_available() else ("cpu", ON_CPU)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    a = torch.randn(size, size, dtype=getattr(torch, compute), device=device)

    def products() -> None:
        for _ in range(times):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return products, (size, times)


def main(library: str, compute: str) -> None:
    """Serves products until the input ends."""
    product, (size, times) = {"numpy": numpy_product, "jax": jax_product, "torch": torch_product}[library](compute)
    for _ in range(3):
        product()
    for count in requests(unit=2 * size**3 * times):
        for _ in range(count):
            product()


if __name__ == "__main__":
    main(*sys.argv[1:3])
