"""The order of examples is a function of seed and step alone: whatever processes make them, and from wherever they go on."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.pipeline import Host
from tests.data.host import ALL, BATCH

SCRIPT = pathlib.Path(__file__).parent / "host.py"


def read_by(hosts, cache, folder, *, first=0, steps=ALL, workers=0):
    """`[seeds, steps, B, L]` tokens as so many processes make them, at the same time, each its rows."""
    outputs = [folder / f"{hosts}-{index}-{first}.npy" for index in range(hosts)]
    command = [sys.executable, "-m", "tests.data.host"]
    running = [
        subprocess.Popen([*command, *map(str, (index, hosts, first, steps, workers, cache, output))], cwd=SCRIPT.parents[2])
        for index, output in enumerate(outputs)
    ]
    assert [process.wait() for process in running] == [0] * hosts
    return np.concatenate([np.load(output) for output in outputs], 2)


def test_two_hosts_and_worker_processes_read_what_one_reads(tmp_path):
    one = read_by(1, tmp_path, tmp_path, steps=50)
    assert one.shape == (2, 50, BATCH, 64) and len(np.unique(one[0].reshape(-1, 64), axis=0)) > 1800
    np.testing.assert_array_equal(read_by(2, tmp_path, tmp_path, steps=50, workers=2), one)


@pytest.mark.slow
def test_ten_thousand_examples_are_those_of_one_host_and_go_on_from_two_hosts_on_four(tmp_path):
    one = read_by(1, tmp_path, tmp_path)
    assert one.shape[1] * one.shape[2] == 10_000
    for hosts in (2, 4):
        np.testing.assert_array_equal(read_by(hosts, tmp_path, tmp_path), one)
    half = ALL // 2
    parts = [read_by(2, tmp_path, tmp_path, steps=half), read_by(4, tmp_path, tmp_path, first=half, steps=ALL - half)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), one)


def test_hosts_share_a_batch_or_say_why_not():
    assert [Host((index,), 4).part(8).tolist() for index in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Host((3, 1), 4).part(8).tolist() == [6, 7, 2, 3] and Host((3, 1), 4).place(slice(2, 4), 8) == slice(2, 4)
    with pytest.raises(ConfigError, match="must be a multiple of the 3 blocks that hosts make, got 8"):
        Host((0,), 3).part(8)
