"""Trials an hour: a population in one program, the same trials one after another, and a PyTorch loop over them.

    python tests/benchmarks/population.py --sizes=XS,S --rounds=1 --peer_python=PEER/bin/python

24 trials (6 learning rates × 4 seeds) of a GPT-2. Every side is one command, timed from its start to its end with cold caches:
imports, compilation, tokenization, training, evaluation and writing down are counted. The sides: `together`, `one-by-one` (a run
for every trial, whose processes share the caches), `pytorch` (a plain GPT, which is faster there than transformers'), and on request
`in-one-process` (programs of one trial, one after another in our runner), `huggingface` and `pytorch-per-core`, whose trials are
spread over one single-threaded process a core.
"""

from __future__ import annotations

import os
import pathlib
import random
import statistics
import string
import sys
import tempfile

from absl import app, flags
from harness import BUSY, HERE, timed
from shapes import SHAPES, rates_and_seeds

SIZES = flags.DEFINE_list("sizes", ["XS", "S"], "Which shapes.")
ROUNDS = flags.DEFINE_integer("rounds", 1, "Runs of each side, in turn.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 400, "Steps of a trial.", lower_bound=1)
TRIALS = flags.DEFINE_string("trials", "6x4", "Learning rates x seeds.")
SIDES = flags.DEFINE_list(
    "sides", ["together", "one-by-one", "pytorch"], "Which sides; ratios are to the last one's time and among ours."
)
PEER = flags.DEFINE_string("peer_python", None, "The interpreter that has PyTorch (default: this one).")
PATIENCE = flags.DEFINE_float("patience", 60.0, "Seconds to wait for the machine to be quiet, before each run.")
RETAKES = flags.DEFINE_integer("retakes", 2, "How often a run is taken again because others were busy.", lower_bound=0)

CHARACTERS = string.ascii_letters + string.digits + " .\n"  # 65, as in the shapes' vocabulary


def write_text(file: pathlib.Path, length: int = 600_000) -> None:
    """A text of 65 different characters with words that recur."""
    rng = random.Random(0)
    words = ["".join(rng.choices(CHARACTERS[:62], k=rng.randint(2, 9))) for _ in range(500)]
    text = CHARACTERS + "".join(rng.choice(words) + rng.choice("  .\n") for _ in range(length // 6))
    file.write_text(text[:length])


def commands(size: str, text: pathlib.Path) -> dict[str, list[str]]:
    """Side → what is run."""
    peer, count = PEER.value or sys.executable, len(rates_and_seeds(TRIALS.value)[0]) * len(rates_and_seeds(TRIALS.value)[1])
    given = [size, str(text), str(STEPS.value), TRIALS.value]
    ours, theirs = [sys.executable, str(HERE / "trials_llm_jax.py"), *given], [peer, str(HERE / "trials_pytorch.py"), *given]
    return {
        "together": [*ours, str(count)],
        "one-by-one": [*ours, "0"],
        "in-one-process": [*ours, "1"],
        "pytorch": [*theirs, "gpt", "1"],
        "huggingface": [*theirs, "huggingface", "1"],
        "pytorch-per-core": [*theirs, "gpt", str(len(os.sched_getaffinity(0)))],
    }


def measure(size: str, folder: pathlib.Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Side → seconds of each round, and side → mean validation loss."""
    text = folder / "text.txt"
    write_text(text)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES.value}
    losses = {}
    for index in range(ROUNDS.value):
        for name in SIDES.value if index % 2 == 0 else SIDES.value[::-1]:
            taken = []
            for attempt in range(1 + RETAKES.value):
                cache = {"LLM_JAX_CACHE": str(folder / f"{size}-{name}-{index}-{attempt}"), "PYTHONPATH": str(HERE.parents[1])}
                log = folder / f"{name}.log"
                taken.append(timed(commands(size, text)[name], environment=cache, log=log, patience=PATIENCE.value))
                if taken[-1][1] < BUSY:
                    break
                print(f"  {name}: others used {taken[-1][1]:.2f} cores", flush=True)
            best = min(taken, key=lambda t: t[1])
            seconds[name].append(best[0])
            losses[name] = float(best[2].split()[-1])
    return seconds, losses


def main(_) -> None:
    """Measures every size in turn."""
    rates, seeds = rates_and_seeds(TRIALS.value)
    for size in SIZES.value:
        with tempfile.TemporaryDirectory() as folder:
            seconds, losses = measure(size, pathlib.Path(folder))
        count = len(rates) * len(seeds)
        print(f"\n{size}: {count} trials of {STEPS.value} steps, {SHAPES[size].parameters:,} parameters each")
        print(
            f"  {'':18}{'trials/hour':>12}{'seconds':>9}{'valid loss':>12}   "
            + "".join(f"{'× ' + name:>19}" for name in SIDES.value)
        )
        for name, own in seconds.items():
            ratios = [statistics.median(b / a for a, b in zip(own, other, strict=True)) for other in seconds.values()]
            typical = statistics.median(own)
            print(
                f"  {name:18}{3600 * count / typical:12,.0f}{typical:9.1f}{losses[name]:12.4f}   "
                + "".join(f"{r:19.2f}" for r in ratios),
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
