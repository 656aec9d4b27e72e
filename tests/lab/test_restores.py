"""A checkpoint from any layout of devices and processes, restored on every other: bit for bit, and training continues."""

import itertools
import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from tests.lab import restores


def begin(devices, *argv):
    """Processes of `restores`, one where there is no coordinator."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    given = os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    given |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "tests.lab.restores", *map(str, argv)], env=given, **pipes)


def pairs(process):
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err[-2000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_every_layout_restores_what_every_other_saved(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [begin(8, tmp_path), *(begin(4, tmp_path, address, 2, index) for index in range(2))]
    try:
        found = [pair for process in processes for pair in pairs(process)]
    finally:
        for process in processes:
            process.kill()
    both = itertools.product(restores.LAYOUTS, repeat=2)
    assert sorted((pair["saved"], pair["onto"]) for pair in found) == sorted(both)
    for pair in found:
        assert pair["same"] and pair["laid_out"] and pair["step"] == restores.STEPS and pair["losses"] < 1e-5, pair
