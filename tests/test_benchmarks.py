"""The benchmarks: what is counted, that ratios and foreign load are what they claim to be, and that the commands run."""

import os
import pathlib
import subprocess
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent / "benchmarks"))
import harness
from gpt2_llm_jax import gpt2
from shapes import SHAPES

from llm_jax.models import count

BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"
QUICK = ["--patience=0", "--rounds=1"]
TEXT = [
    "pipeline.py",
    *QUICK,
    "--corpus=StandardLibrary(megabytes=0.3)",
    "--tokenizer=ByteLevelBPE(400)",
    "--length=64",
    "--seconds=0",
]
MOE = ["moe.py", *QUICK, "--widths=32", "--tokens=256", "--length=64", "--steps=1"]

WORKER = """
import json, sys
print("a greeting that is not protocol", flush=True)
print("ready", json.dumps({{"unit": {unit}}}), flush=True)
for line in sys.stdin:
    print("done", json.dumps({{"seconds": int(line.split()[1]) * {seconds}}}), flush=True)
"""


def side(name: str, *, unit: int, seconds: float) -> harness.Side:
    return harness.Side(name, [sys.executable, "-c", WORKER.format(unit=unit, seconds=seconds)])


@pytest.mark.parametrize("size", SHAPES)
def test_both_sides_count_the_same(size):
    shape = SHAPES[size]
    model = gpt2(shape, steps=10, log_every=10).model
    assert count.parameters(model, shape.vocabulary) == shape.parameters
    assert count.flops_per_token(model, shape.vocabulary, shape.length) == shape.flops_per_token


def test_rates_and_ratios(tmp_path):
    sides = [side("fast", unit=100, seconds=0.5), side("slow", unit=100, seconds=2.0), side("peak numpy", unit=7, seconds=1.0)]
    rates = harness.interleave(sides, rounds=3, seconds=4.0, logs=tmp_path, patience=0.0, retakes=0)
    assert rates.median("fast") == 200.0
    assert rates.ratio("fast", "slow") == (4.0, 4.0, 4.0)
    assert harness.peak(rates) == 7.0


def test_a_worker_that_ends_early_says_why(tmp_path):
    broken = harness.Side("broken", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(RuntimeError, match="no such model"):
        harness.interleave([broken], rounds=1, seconds=1.0, logs=tmp_path, patience=0.0, retakes=0)


def test_work_of_children_is_our_own():
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    before = harness.own_seconds()
    running = subprocess.Popen(
        [sys.executable, "-c", burn + "\nprint(flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    running.stdout.readline()
    alive = harness.own_seconds()
    running.communicate(b"\n")
    ended = harness.own_seconds()
    assert alive - before >= 0.45
    assert ended - before >= 0.45
    assert harness.machine_seconds() >= ended


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, code, shown",
    [
        ([*MOE, "--gated", "--blocks=64", "--ragged"], 0, "dropless"),
        ([*MOE, "--at_most=0.01"], 1, "skewed"),
        (["attention.py", *QUICK, "--lengths=128", "--long=1024"], 0, "1024 tokens, blockwise"),
        (["train.py", *QUICK, "--sizes=XS", "--sides=llm_jax", "--seconds=0.2", "--retakes=0"], 0, "108,352 parameters"),
        (["losses.py", "--rounds=0", "--at_most=0.125"], 0, "times as much"),  # 8,192 tokens × 131,072 ids, as the compiler counts
        (["losses.py", "--rounds=0", "--at_most=0.125", "--tokens=256", "--vocabulary=512"], 1, "1.0 times as much"),
        ([*TEXT, "--paragraphs", "--tried=50", "--at_least=0.01,0.01"], 0, "arrow without map"),
        ([*TEXT, "--works=packing", "--at_least=0,1e9"], 1, "both sides' tokens are the same"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_benchmark_runs(command, code, shown):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(BENCHMARKS.parent.parent)}
    script = str(BENCHMARKS / command[0])
    run = subprocess.run([sys.executable, script, *command[1:]], env=env, capture_output=True, text=True)
    assert run.returncode == code and shown in run.stdout, run.stdout + run.stderr
