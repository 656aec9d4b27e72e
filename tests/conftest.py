"""Eight virtual CPU devices, strict ranks, quick compilation, and a cache of programs that all workers and later runs share."""

import gc
import os
import pathlib
import tempfile
import uuid

from llm_jax.core.platform import SUMS_AS_WRITTEN
from tests.quick import EMITTERS, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
if "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {flags(EMITTERS)}"
if "xla_disable_hlo_passes" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {SUMS_AS_WRITTEN}"

import jax
import pytest

from tests.buckets import NAME, serving

CACHE = pathlib.Path(os.environ.get("LLM_JAX_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "llm_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
gc.set_threshold(
    100_000, 20, 100
)  # programs are large heaps of objects that live on: looking through them took a fifth of the time


@pytest.fixture(scope="session")
def cloud():
    """What a process must have in its environment to see the bucket, as this one then has."""
    with serving() as values:
        os.environ.update(values)
        yield values


@pytest.fixture
def bucket(cloud) -> str:
    """The address of an empty folder in a bucket."""
    return f"gs://{NAME}/{uuid.uuid4().hex}"
