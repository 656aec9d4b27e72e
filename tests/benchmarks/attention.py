"""Memory and time of attention's gradient, written out (dense) against by blocks, on this machine.

    python tests/benchmarks/attention.py --lengths=512,1024,2048,4096 --rounds=5

First the peak of temporaries at `--long` tokens, as the compiler counts it, and one real step by blocks. Then seconds of both
kernels in turn, on one thread as each device of `core.platform.setup` has, by the CPU's clock, which other processes hardly move:
medians, and the median of the rounds' ratios with the least and the greatest. Causal, float32.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

from absl import app, flags
from harness import BUSY, Watch, wait_for_quiet

from llm_jax.core import platform

LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens, for the times.")
LONG = flags.DEFINE_integer("long", 32768, "Tokens, for the memory; 0: leave it out.", lower_bound=0)
ROWS = flags.DEFINE_integer("rows", 1, "Sequences.", lower_bound=1)
HEADS = flags.DEFINE_integer("heads", 8, "Query heads.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "Heads of keys and values.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 64, "Channels of a head.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kernel, in turn.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", None, "A sliding window of so many tokens instead of all before.")
BLOCK = flags.DEFINE_integer("block", None, "attention_block instead of the platform's.")
PATIENCE = flags.DEFINE_float("patience", 20.0, "Seconds to wait for the machine to be quiet, before each round.")
LABELS = {"dense": "written out at once", "blockwise": "by blocks"}
KERNELS = tuple(LABELS)
GIB = 2**30


def gradient(backend: str, length: int):
    """The compiled gradient of Σ attend(q, k, v), and the shapes of its arguments."""
    import jax

    from llm_jax.nn.attention import Causal, SlidingWindow, attend

    mask = Causal() if WINDOW.value is None else SlidingWindow(WINDOW.value)
    shapes = [
        jax.ShapeDtypeStruct((ROWS.value, length, heads, SIZE.value), "float32") for heads in (HEADS.value, *[KV_HEADS.value] * 2)
    ]
    step = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, mask=mask, backend=backend).sum(), (0, 1, 2)))  # type: ignore[arg-type]
    return step.lower(*shapes).compile(), shapes


def timer(backend: str, length: int) -> Callable[[], float]:
    """Seconds of one step, compiled and warmed up."""
    import jax

    compiled, shapes = gradient(backend, length)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    given = [jax.random.normal(key, shape.shape) for key, shape in zip(keys, shapes, strict=True)]

    def run() -> float:
        start = time.process_time()
        jax.block_until_ready(compiled(*given))
        return time.process_time() - start

    run()
    return run


def memory(length: int) -> None:
    """Prints temporaries of both kernels, and the time of one step by blocks."""
    for backend in KERNELS:
        with platform.targeting("gpu") if backend == "dense" else platform.targeting("cpu"):  # without row blocks: quick to compile
            compiled, _ = gradient(backend, length)
        print(
            f"{length} tokens, {backend}: {compiled.memory_analysis().temp_size_in_bytes / GIB:.2f} GiB of temporaries", flush=True
        )
    print(f"{length} tokens, by blocks: one step takes {timer('blockwise', length)():.1f} s of one core", flush=True)


def times(length: int) -> None:
    """Prints a row of the table."""
    timers = {backend: timer(backend, length) for backend in KERNELS}
    seconds: dict[str, list[float]] = {backend: [] for backend in KERNELS}
    disturbed = 0
    for index in range(ROUNDS.value):
        wait_for_quiet(PATIENCE.value)
        watch = Watch()
        for backend in KERNELS if index % 2 == 0 else KERNELS[::-1]:
            seconds[backend].append(timers[backend]())
        disturbed += watch.read()[1] > BUSY
    ratios = [dense / block for dense, block in zip(*seconds.values(), strict=True)]
    medians = "".join(f"{1e3 * statistics.median(s):12.1f}" for s in seconds.values())
    print(
        f"{length:8}{medians}{statistics.median(ratios):12.2f}   [{min(ratios):.2f}, {max(ratios):.2f}]{disturbed:12}", flush=True
    )


def main(_) -> None:
    """Memory, then times."""
    if BLOCK.value is not None:
        from dataclasses import replace

        platform.CPU = replace(platform.CPU, attention_block=BLOCK.value)
    if LONG.value:
        memory(LONG.value)
    print(f"{'tokens':>8}{'dense ms':>12}{'by blocks':>12}{'× faster':>12}   [least, greatest]   disturbed")
    for length in LENGTHS.value:
        times(int(length))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    app.run(main)
