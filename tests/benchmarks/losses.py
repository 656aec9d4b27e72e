"""Memory and time of the cross-entropy and its gradient from the output layer, all logits at once against blocks of tokens.

    python tests/benchmarks/losses.py --tokens=8192 --vocabulary=131072 --width=256 --rounds=3 --at_most=0.125 --at_least=0.9

First the peak of temporaries, as the compiler counts it. Then seconds of both in turn: medians, and the median of the rounds' ratios
with the least and the greatest; on a CPU on one thread as each device of `core.platform.setup` has, by the CPU's clock, which other
processes hardly move; on a GPU (`JAX_PLATFORMS=cuda`) ten steps at a time. Last the peak of the process's memory with blocks alone
(--rounds=0 leaves the times out). The exit code is 1 where temporaries are more than --at_most of those of all at once, or blocks
less than --at_least as quick.
"""

from __future__ import annotations

import os
import resource
import statistics
import time

from absl import app, flags

from llm_jax.core import platform

TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens, in 8 rows.", lower_bound=8)
VOCABULARY = flags.DEFINE_integer("vocabulary", 131072, "Token ids.", lower_bound=2)
WIDTH = flags.DEFINE_integer("width", 256, "Channels of a hidden state.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed steps of each, in turn.", lower_bound=0)
BLOCK = flags.DEFINE_integer("block", None, "Tokens of a block instead of the platform's choice.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of hidden states and the output layer.")
AT_MOST = flags.DEFINE_float("at_most", None, "The most of the temporaries of all logits at once that blocks may take.")
AT_LEAST = flags.DEFINE_float("at_least", None, "The least times as quick as all at once.")
GIB = 2**30


def programs():
    """Name → the jitted loss and gradient, and their arguments' shapes."""
    import jax
    import jax.numpy as jnp

    from llm_jax.nn.kernels import blocks
    from llm_jax.nn.kernels.unembedding import Unembedding
    from llm_jax.nn.losses import cross_entropy

    rows = 8, TOKENS.value // 8
    layer = Unembedding(
        jax.ShapeDtypeStruct((*rows, WIDTH.value), DTYPE.value),
        jax.ShapeDtypeStruct((VOCABULARY.value, WIDTH.value), DTYPE.value),
        table=True,
    )
    targets = jax.ShapeDtypeStruct(rows, "int32")
    judge = lambda _, logits, targets: cross_entropy(logits, targets)[0]  # noqa: E731
    dense = lambda layer, targets: judge({}, layer.logits(), targets).sum()  # noqa: E731
    by_blocks = lambda layer, targets: blocks.total(judge, layer, targets, jnp.ones(rows), {})  # noqa: E731
    both = {"by blocks": by_blocks, "at once": dense}
    return {name: jax.jit(jax.value_and_grad(function)) for name, function in both.items()}, (layer, targets)


def main(_) -> int:
    """Memory, then times; 0, or 1 where a bound is not kept."""
    import jax
    import numpy as np

    if BLOCK.value is not None:
        from dataclasses import replace

        change = {"logits_at_once": 1, "tokens_at_once": BLOCK.value}
        platform.CPU, platform.GPU = (replace(own, **change) for own in (platform.CPU, platform.GPU))
    functions, shapes = programs()
    compiled = {name: function.lower(*shapes).compile() for name, function in functions.items()}
    peak = {name: program.memory_analysis().temp_size_in_bytes / GIB for name, program in compiled.items()}
    for name, size in peak.items():
        print(f"{name}: {size:.3f} GiB of temporaries", flush=True)
    print(f"all at once takes {peak['at once'] / peak['by blocks']:.1f} times as much", flush=True)
    kept = AT_MOST.value is None or peak["by blocks"] <= AT_MOST.value * peak["at once"]
    layer, targets = shapes
    rng = np.random.default_rng(0)
    scale = WIDTH.value**-0.5
    layer = jax.tree.map(lambda s: jax.device_put(scale * rng.standard_normal(s.shape, np.float32)).astype(s.dtype), layer)
    targets = jax.device_put(rng.integers(0, VOCABULARY.value, targets.shape, np.int32))

    clock, times = (time.process_time, 1) if jax.default_backend() == "cpu" else (time.perf_counter, 10)

    def seconds(name: str) -> float:
        start = clock()
        jax.block_until_ready([compiled[name](layer, targets) for _ in range(times)])
        return (clock() - start) / times

    seconds("by blocks")
    print(f"by blocks: the process had {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most", flush=True)
    if not ROUNDS.value:
        return 0 if kept else 1
    seconds("at once")
    print(f"at once: the process had {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most", flush=True)
    taken: dict[str, list[float]] = {name: [] for name in compiled}
    for index in range(ROUNDS.value):
        for name in list(taken) if index % 2 == 0 else list(taken)[::-1]:
            taken[name].append(seconds(name))
    ratios = [dense / block for block, dense in zip(*taken.values(), strict=True)]
    medians = ", ".join(f"{name} {statistics.median(values):.4f} s" for name, values in taken.items())
    print(f"{medians}; by blocks {statistics.median(ratios):.2f} times as fast [{min(ratios):.2f}, {max(ratios):.2f}]")
    return 0 if kept and (AT_LEAST.value is None or statistics.median(ratios) >= AT_LEAST.value) else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    app.run(main)
