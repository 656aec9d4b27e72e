"""What is set for the whole process."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from llm_jax.core import platform
platform.setup(cache=False)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), *(faults() for _ in range(3)))
"""


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else True, reason="this is about glibc")
@pytest.mark.parametrize("own", [False, True], ids=["unset", "the user's own"])
def test_freed_memory_is_used_again(own):
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env = kept | {"NUMPY_MADVISE_HUGEPAGE": "0"} | ({"MALLOC_TRIM_THRESHOLD_": "131072"} if own else {})
    run = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    first, *others = map(int, run.stdout.split())
    assert (max(others) > first / 2) if own else (max(others) < first / 8)
