"""The benchmarks' commands run; what they measure is for a quiet machine to say."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
QUICK = ["--patience=0", "--rounds=1"]
MOE = ["moe.py", *QUICK, "--widths=32", "--tokens=256", "--length=64", "--steps=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, code, shown",
    [
        ([*MOE, "--gated", "--blocks=64", "--ragged"], 0, "dropless"),
        ([*MOE, "--at_most=0.01"], 1, "skewed"),
        (["attention.py", *QUICK, "--lengths=128", "--long=1024"], 0, "1024 tokens, blockwise"),
        (["train.py", *QUICK, "--sizes=XS", "--sides=llm_jax", "--seconds=0.2", "--retakes=0"], 0, "108,352 parameters"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_benchmark_runs(command, code, shown):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(HERE.parent)}
    script = str(HERE / "benchmarks" / command[0])
    run = subprocess.run([sys.executable, script, *command[1:]], env=env, capture_output=True, text=True)
    assert run.returncode == code and shown in run.stdout, run.stdout + run.stderr
