"""What the machine is, and the choices that follow from it; model code asks here and stays free of `if cpu`.

The CPU values were measured (ratios of step time, 2 cores, GPT-2-shaped models; `tests/benchmarks/train.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llm_jax.core import chips
from llm_jax.core.config import ConfigError

LIBTPU = "LIBTPU_INIT_ARGS"  # where libtpu reads its flags, once a process
# XLA:CPU would add bfloat16 up in float32, and dies where a `shard_map` leaves axes to the compiler ("Invalid binary
# instruction opcode copy"): the sum that JAX writes there has a sharding constraint in it
SUMS_AS_WRITTEN = "--xla_disable_hlo_passes=all-reduce-promotion"


@dataclass(frozen=True)
class Traits:
    """How a platform likes the same mathematics written."""

    scan_layers: bool  # one compiled layer body; unrolled is 1.5× faster on CPU
    steps_per_dispatch: int  # optimizer steps in one call of the compiled program, at most
    transposed_weight_gradient: bool  # dW = (gᵀx)ᵀ: XLA:CPU otherwise copies transposed activations
    products_together: bool  # several products of one input as a single wider one
    row_sums_by_product: bool  # sums over the last axis as products with ones
    attention_row_block: int | None  # causal attention by blocks of query rows, skipping what lies after them
    attention_block: int  # queries and keys of a block of blockwise attention, at most; on CPU 128 is 1.6–2.2× as fast as 512
    # queries × keys up to which attention writes its scores out. By blocks its gradient on CPU is 0.85–1.28× as fast at 512 tokens,
    # 1.2–1.4× at 1,024, 1.3× at 2,048, 1.35× at 4,096 (`tests/benchmarks/attention.py`); accelerators' value is for memory's sake
    dense_attention: int
    # tokens × ids up to which logits are made at once, and else of a block of tokens, but of `tokens_at_once` at least. By blocks
    # the loss and its gradient on CPU are 1.24× as fast at 8,192 × 131,072, 1.30× at 4,096 × 50,257 with 256 tokens in a
    # block (`tests/benchmarks/losses.py`); the TPU's values are not measured
    logits_at_once: int
    tokens_at_once: int
    # tokens of a program that scores rows, on each device; on CPU 256 to 4,096 are as fast (width 384), and empty rows cost less of
    # few; accelerators' value is not measured
    scored_at_once: int
    fused_attention: str | None  # the platform's own kernel, tried first
    flat_gradient_sums: bool  # gradients of data-parallel devices added up as one array
    population_in_turn: bool  # trials of one device one after another inside the program, not batched by vmap
    ragged_exchange: bool  # messages of unequal lengths from every device to every other
    expert_blocks: bool  # products with experts' matrices by blocks of rows: XLA:CPU's ragged_dot does the work of all experts
    # gloo waits for 30 s where processes first connect, which those of any set of devices do when it is first used, and in every
    # reduce-scatter
    messages_give_up: bool
    recomputed_inside: bool  # what is computed again for one product alone is computed inside of it, and never written


CPU = Traits(
    scan_layers=False,
    steps_per_dispatch=10,
    transposed_weight_gradient=True,
    products_together=True,
    row_sums_by_product=True,
    attention_row_block=128,
    attention_block=128,
    dense_attention=512 * 512,
    logits_at_once=1 << 25,
    tokens_at_once=256,
    scored_at_once=512,
    fused_attention=None,
    flat_gradient_sums=True,
    population_in_turn=True,
    ragged_exchange=False,
    expert_blocks=True,
    messages_give_up=True,
    recomputed_inside=False,
)
ACCELERATOR = Traits(
    scan_layers=True,
    steps_per_dispatch=1,
    transposed_weight_gradient=False,
    products_together=False,
    row_sums_by_product=False,
    attention_row_block=None,
    attention_block=512,
    dense_attention=1024 * 1024,
    logits_at_once=1 << 27,
    tokens_at_once=1024,
    scored_at_once=8192,
    fused_attention=None,
    flat_gradient_sums=False,
    population_in_turn=False,
    ragged_exchange=True,
    expert_blocks=False,
    messages_give_up=False,
    recomputed_inside=True,
)

# On an H200 GPT-2 124M in bfloat16, 16 × 1,024 tokens (`tests/benchmarks/train.py --sizes=124M`), trains 1.25× as fast with layers
# unrolled as scanned, and 1.07× as fast with all logits at once as with 1,024 tokens' at a time; the loss and its gradient alone
# (`losses.py`, 50,304 ids) are 0.71× as fast by 1,024 tokens as at once, 0.89× by 4,096, 0.96× by 8,192. Attention's gradient
# (`attention.py`, 8 heads, 2 of keys) is 2.6× as fast by cuDNN as written out at 1,024 tokens and 9.1× at 4,096; by blocks it is
# slower: 0.6× and 0.97×, in float32 0.4× and 0.66×
GPU = replace(
    ACCELERATOR,
    scan_layers=False,
    logits_at_once=1 << 29,
    fused_attention="cudnn",
)
TPU = replace(ACCELERATOR, fused_attention="splash")

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def name() -> str:
    """The platform that programs are being written for ("cpu", "gpu", "tpu"): the default backend, or `targeting`'s."""
    import jax

    return _target.get() or jax.default_backend()


def traits() -> Traits:
    """The traits of that platform."""
    return {"cpu": CPU, "gpu": GPU, "tpu": TPU}.get(name(), ACCELERATOR)


@contextlib.contextmanager
def targeting(platform: str) -> Iterator[None]:
    """Write programs for `platform` ("cpu", "gpu", "tpu"), whatever this machine has: ahead-of-time compilation."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def setup(*, devices: int | None = None, cache: bool = True, deterministic: bool = False, alone: bool = True) -> None:
    """Process-wide settings, to be called before JAX opens a backend; what the user set in `XLA_FLAGS`, `LIBTPU_INIT_ARGS` wins.

    A CPU becomes one single-threaded device a core (or `devices` of them), so that the data or population axis uses the cores:
    1.5× faster than one device with a thread pool at GPT-2-tiny sizes. Compiled programs are cached on disk (`LLM_JAX_CACHE`).

    alone: where it is false, as of one of several processes, devices keep their threads: messages that wait for other processes
    would else hold up those that the others wait for.
    deterministic: the same command on the same devices gives the same bits. CPUs and TPUs do so anyway; a GPU adds up by atomics,
    and takes whichever kernel was quickest when it tried them, unless told not to, which costs some speed. Random numbers are the
    same however arrays are split (`jax_threefry_partitionable`, JAX's default). Raises `ConfigError` where `XLA_FLAGS` has the
    opposite.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and os.environ.get("JAX_PLATFORMS") not in ("cpu", "tpu"):
        if "xla_gpu_deterministic_ops=false" in flags:
            raise ConfigError("contradicts XLA_FLAGS with its xla_gpu_deterministic_ops=false: leave one out", "--deterministic")
        os.environ["XLA_FLAGS"] = flags = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "xla_disable_hlo_passes" not in flags and os.environ.get("JAX_PLATFORMS") not in ("cuda", "tpu"):
        os.environ["XLA_FLAGS"] = flags = f"{flags} {SUMS_AS_WRITTEN}".strip()
    if "xla_force_host_platform_device_count" not in flags:
        count = devices or cores()
        flags += f" --xla_force_host_platform_device_count={count}"
        if count > 1 and alone and "xla_cpu_multi_thread_eigen" not in flags:
            flags += " --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = flags.strip()
    _set_libtpu_flags()
    if cache:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _set_libtpu_flags() -> None:
    """Those with which messages overlap, on a slice whose environment says what chips it has: GKE's and Cloud TPU's do."""
    chip, given = chips.of_accelerator(os.environ.get("TPU_ACCELERATOR_TYPE", "")), os.environ.get(LIBTPU, "")
    if chip is None or os.environ.get("JAX_PLATFORMS") not in (None, "", "tpu"):
        return
    flags = [flag for flag in chip.libtpu if flag.partition("=")[0] not in given]
    if flags:
        os.environ[LIBTPU] = " ".join([*flags, given]).strip()


def require_devices() -> None:
    """Opens the backend. Raises `ConfigError` if JAX has none of the kind that was asked for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].splitlines()[0] if str(error) else "no such device"
        way = "unset it where this machine has none, and where it has some install the extra for them"
        raise ConfigError(f"asks for devices that JAX does not find ({reason}): {way}", f"JAX_PLATFORMS={asked}") from None


def cache_dir() -> pathlib.Path:
    """Where rebuildable files live: `LLM_JAX_CACHE`, else `~/.cache/llm_jax`."""
    return pathlib.Path(os.environ.get("LLM_JAX_CACHE") or pathlib.Path.home() / ".cache" / "llm_jax")


def memory() -> float:
    """Bytes of memory of all devices together; CPU devices share the machine's, or what its container may use of it."""
    import jax

    known = [stats["bytes_limit"] for stats in (device.memory_stats() for device in jax.local_devices()) if stats]
    if known:
        return sum(known) * jax.device_count() / len(known)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    container = pathlib.Path("/sys/fs/cgroup/memory.max")
    allowed = container.read_text().strip() if container.is_file() else "max"
    return (machine if allowed == "max" else min(machine, int(allowed))) * jax.process_count()


def is_exhausted(error: BaseException) -> bool:
    """Whether a device had no room for a program or its arrays."""
    return "RESOURCE_EXHAUSTED" in str(error)


@functools.cache
def peak_flops() -> float:
    """Matrix-product peak of all devices together, FLOP/s: the data sheet's, or on a CPU measured here (0.3 s, f32)."""
    import jax

    devices = jax.devices()
    chip = chips.of_kind(devices[0].device_kind)
    return _measured_peak() if chip is None else chip.flops / chip.devices * len(devices)


def _measured_peak(sizes: tuple[int, ...] = (384, 1024), seconds: float = 0.3) -> float:
    """The best of many samples: a busy machine leaves short ones alone, many devices need long ones to be worth their dispatch.

    Beside six busy processes on two cores the best of size 384 was 85% of an idle machine's, and of 1024 39% (medians).
    """
    import jax
    import jax.numpy as jnp

    product, best = jax.jit(lambda a: a @ a), 0.0
    for size in sizes:
        operands = [jax.device_put(jnp.ones((size, size), jnp.float32), d) for d in jax.local_devices()]
        jax.block_until_ready([product(a) for a in operands])
        stop = time.perf_counter() + seconds / len(sizes)
        while (start := time.perf_counter()) < stop:
            jax.block_until_ready([product(a) for a in operands])
            best = max(best, 2 * size**3 * jax.device_count() / (time.perf_counter() - start))
    return best
