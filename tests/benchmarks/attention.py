"""Memory and time of attention's gradient, written out (dense) against by blocks, on this machine.

    python tests/benchmarks/attention.py --lengths=512,1024,2048,4096 --rounds=5
    JAX_PLATFORMS=cuda python tests/benchmarks/attention.py --kernels=dense,blockwise,cudnn --dtype=bfloat16 --rows=4 --long=0

First the peak of temporaries at `--long` tokens, as the compiler counts it, and one real step by blocks. Then seconds of the
kernels in turn: medians, and the median of the rounds' ratios to the first with the least and the greatest. Causal. On a CPU they
run on one thread as each device of `core.platform.setup` has, and the clock is the CPU's, which other processes hardly move.
"""

from __future__ import annotations

import contextlib
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
KERNELS = flags.DEFINE_list(
    "kernels", ["dense", "blockwise"], "Backends of attention; the first is what the others are compared with."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of queries, keys and values.")
GIB = 2**30


def gradient(backend: str, length: int):
    """The compiled gradient of Σ attend(q, k, v), and the shapes of its arguments."""
    import jax

    from llm_jax.nn.attention import Causal, SlidingWindow, attend

    mask = Causal() if WINDOW.value is None else SlidingWindow(WINDOW.value)
    shapes = [
        jax.ShapeDtypeStruct((ROWS.value, length, heads, SIZE.value), DTYPE.value) for heads in (HEADS.value, *[KV_HEADS.value] * 2)
    ]
    step = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, mask=mask, backend=backend).astype("float32").sum(), (0, 1, 2)))  # type: ignore[arg-type]
    return step.lower(*shapes).compile(), shapes


def timer(backend: str, length: int) -> Callable[[], float]:
    """Seconds of one step, compiled and warmed up."""
    import jax

    compiled, shapes = gradient(backend, length)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    given = [jax.random.normal(key, shape.shape, shape.dtype) for key, shape in zip(keys, shapes, strict=True)]
    clock, times = (time.process_time, 1) if jax.default_backend() == "cpu" else (time.perf_counter, 20)

    def run() -> float:
        start = clock()
        jax.block_until_ready([compiled(*given) for _ in range(times)])
        return (clock() - start) / times

    run()
    return run


def memory(length: int) -> None:
    """Prints temporaries of every kernel, and the time of one step by blocks."""
    for backend in KERNELS.value:
        with platform.targeting("gpu") if backend == "dense" else contextlib.nullcontext():  # without row blocks: quick to compile
            compiled, _ = gradient(backend, length)
        print(
            f"{length} tokens, {backend}: {compiled.memory_analysis().temp_size_in_bytes / GIB:.2f} GiB of temporaries", flush=True
        )
    if "blockwise" in KERNELS.value:
        print(f"{length} tokens, by blocks: one step takes {timer('blockwise', length)():.3f} s", flush=True)


def times(length: int) -> None:
    """Prints a row of the table."""
    import jax

    names, timers = KERNELS.value, {}
    for name in names:
        try:
            timers[name] = timer(name, length)
        except jax.errors.JaxRuntimeError as error:  # the scores do not fit
            if not platform.is_exhausted(error):
                raise
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    disturbed = 0
    for index in range(ROUNDS.value):
        wait_for_quiet(PATIENCE.value)
        watch = Watch()
        for name in timers if index % 2 == 0 else reversed(timers):
            seconds[name].append(timers[name]())
        disturbed += watch.read()[1] > BUSY
    cells = [f"{1e3 * statistics.median(seconds[name]):12.2f}" if name in seconds else f"{'no room':>12}" for name in names]
    for name in names[1:]:
        if names[0] in seconds and name in seconds:
            ratios = [base / own for base, own in zip(seconds[names[0]], seconds[name], strict=True)]
            cells.append(f"{statistics.median(ratios):9.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        else:
            cells.append(f"{'':22}")
    print(f"{length:8}{''.join(cells)}{disturbed:12}", flush=True)


def main(_) -> None:
    """Memory, then times."""
    if BLOCK.value is not None:
        from dataclasses import replace

        platform.CPU, platform.GPU = (replace(own, attention_block=BLOCK.value) for own in (platform.CPU, platform.GPU))
    if LONG.value:
        memory(LONG.value)
    heads = [f"{name + ' ms':>12}" for name in KERNELS.value] + [f"{'× ' + name:>22}" for name in KERNELS.value[1:]]
    print(f"{'tokens':>8}{''.join(heads)}   disturbed")
    for length in LENGTHS.value:
        times(int(length))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    app.run(main)
