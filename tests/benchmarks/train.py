"""Training throughput of llm_jax against Hugging Face's GPT-2 in PyTorch, in turn, on this machine.

    python tests/benchmarks/train.py --sizes=XS,S,M,L --rounds=5 --peer_python=PEER/bin/python

Same function (erf GELU, biases, learned positions, tied output layer), same batch, AdamW, clipped gradients, float32. On a GPU:

    JAX_PLATFORMS=cuda python tests/benchmarks/train.py --sizes=124M,350M --sides=llm_jax,compiled,gpt_compiled --seconds=5

which computes in bfloat16, parameters in float32. The peer's interpreter needs `torch==2.13.0`, `transformers` and `numpy`. Printed for every side: tokens a second, its share of the machine's
matrix-product peak (the best of NumPy, JAX and PyTorch, measured in the same rounds), and the ratio to PyTorch eager: the
median of the rounds' ratios, with the least and the greatest.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

from absl import app, flags
from harness import HERE, Rates, Side, interleave, peak, peaks
from shapes import SHAPES, Shape

SIZES = flags.DEFINE_list("sizes", ["XS", "S", "M", "L"], "Which shapes.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Pieces of each side.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 2.0, "How long a piece takes, about.")
SIDES = flags.DEFINE_list(
    "sides", ["llm_jax", "eager", "compiled"], "Of llm_jax, eager, compiled, and gpt and gpt_compiled, a plain GPT in PyTorch."
)
PEER = flags.DEFINE_string("peer_python", None, "The interpreter that has PyTorch and transformers (default: this one).")
SET = flags.DEFINE_multi_string("set", [], "path=value: a change to our experiment, e.g. train.steps_per_dispatch=1.")
DEVICES = flags.DEFINE_integer("devices", None, "Virtual CPU devices of our side (default: what the platform layer chooses).")
PATIENCE = flags.DEFINE_float("patience", 20.0, "Seconds to wait for the machine to be quiet, before each piece.")
RETAKES = flags.DEFINE_integer("retakes", 3, "How often a piece is taken again because others were busy.", lower_bound=0)
MEMORY = flags.DEFINE_string("memory", "0.4", "The share of a GPU's memory that our side may take: the others live beside it.")
LOGS = flags.DEFINE_string("logs", None, "Where what the workers print to standard error goes (default: nowhere).")

BASE = "eager"


def sides(size: str) -> list[Side]:
    """The sides asked for, and the peaks."""
    peer = PEER.value or sys.executable
    root = str(HERE.parents[1])
    ours = {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])} | (
        {"DEVICES": str(DEVICES.value)} if DEVICES.value else {}
    )
    ours |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY.value}
    known = {
        "llm_jax": Side("llm_jax", [sys.executable, str(HERE / "worker_llm_jax.py"), size, *SET.value], ours),
        "eager": Side("eager", [peer, str(HERE / "worker_pytorch.py"), size, "eager", "huggingface"]),
        "compiled": Side("compiled", [peer, str(HERE / "worker_pytorch.py"), size, "compiled", "huggingface"]),
        "gpt": Side("gpt", [peer, str(HERE / "worker_pytorch.py"), size, "eager", "gpt"]),
        "gpt_compiled": Side("gpt_compiled", [peer, str(HERE / "worker_pytorch.py"), size, "compiled", "gpt"]),
    }
    torch = peer if any(name != "llm_jax" for name in SIDES.value) else None
    return [known[name] for name in SIDES.value] + peaks(torch, SHAPES[size].compute)


def show(size: str, shape: Shape, rates: Rates) -> None:
    """Prints a size's table."""
    best, base = peak(rates), BASE if BASE in SIDES.value else SIDES.value[0]
    each = ", ".join(
        f"{name.removeprefix('peak ')} {rates.median(name) / 1e9:,.0f}" for name in rates.rates if name.startswith("peak ")
    )
    kept = f"pieces kept while others were busy: {rates.disturbed}"
    print(
        f"\n{size}: {shape.depth} layers × {shape.width}, block {shape.length}, batch {shape.rows}, vocabulary {shape.vocabulary:,}, "
        f"{shape.parameters:,} parameters; peak GFLOP/s: {each}; {kept}"
    )
    print(f"  {'':14}{'tokens/s':>12}{'of peak':>9}{f'× {base}':>16}   [least, greatest]   to first step")
    for name in SIDES.value:
        if rates.info[name]["parameters"] != shape.parameters:
            raise RuntimeError(
                f"{name} has {rates.info[name]['parameters']:,} parameters, not {shape.parameters:,}: another function"
            )
        speed, (ratio, least, greatest) = rates.median(name), rates.ratio(name, base)
        share = speed * shape.flops_per_token / best
        print(
            f"  {name:14}{speed:12,.0f}{share:9.1%}{ratio:16.3f}   [{least:.3f}, {greatest:.3f}]{rates.startup[name]:13.1f} s",
            flush=True,
        )


def main(_) -> None:
    """Measures every size in turn."""
    with tempfile.TemporaryDirectory() as folder:
        logs = pathlib.Path(LOGS.value or folder)
        logs.mkdir(parents=True, exist_ok=True)
        for size in SIZES.value:
            rates = interleave(
                sides(size), rounds=ROUNDS.value, seconds=SECONDS.value, logs=logs, patience=PATIENCE.value, retakes=RETAKES.value
            )
            show(size, SHAPES[size], rates)


if __name__ == "__main__":
    app.run(main)
