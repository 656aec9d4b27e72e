"""How soon a validation loss of 1.88 is reached: our recipe against nanoGPT's published CPU run in PyTorch.

    python tests/benchmarks/time_to_loss.py --text=tinyshakespeare.txt --peer_python=PEER/bin/python

Character level, the last tenth of the text for validation, both sides from the start of the process with cold caches: imports,
compilation, training and evaluation are counted. The loss compared is that of the whole validation split; the reference's own
estimate from 20 random batches is printed beside it, and its time ends with its last step, before the whole split is scored.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import time

from absl import app, flags
from harness import BUSY, HERE, timed

TEXT = flags.DEFINE_string("text", None, "The text file.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 1, "Runs of each side, in turn, each with a seed of its own.", lower_bound=1)
PEER = flags.DEFINE_string("peer_python", None, "The interpreter that has PyTorch (default: this one).")
SIDES = flags.DEFINE_list("sides", ["llm_jax", "nanogpt"], "Which sides.")
SET = flags.DEFINE_multi_string("set", [], "path=value: a change to our recipe.")
TARGET = flags.DEFINE_float("target", 1.88, "The loss to reach.")
PATIENCE = flags.DEFINE_float("patience", 60.0, "Seconds to wait for the machine to be quiet, before each run.")
RETAKES = flags.DEFINE_integer("retakes", 2, "How often a run is taken again because others were busy.", lower_bound=0)


def run(name: str, seed: int, folder: pathlib.Path) -> dict:
    """A side's last line, and its estimate where it made one; taken again while others are busy."""
    text = str(pathlib.Path(TEXT.value).resolve())
    command = {
        "llm_jax": [sys.executable, str(HERE / "shakespeare_llm_jax.py"), text, *SET.value],
        "nanogpt": [PEER.value or sys.executable, str(HERE / "shakespeare_pytorch.py"), text],
    }[name]
    tries = []
    for attempt in range(1 + RETAKES.value):
        cache = str(folder / f"{name}-{seed}-{attempt}")
        environment = {"LLM_JAX_CACHE": cache, "PYTHONPATH": str(HERE.parents[1]), "SEED": str(seed)}
        _, others, output = timed(command, environment=environment, log=folder / f"{name}.log", patience=PATIENCE.value)
        tries.append((others, [json.loads(line) for line in output.splitlines() if line.startswith("{")]))
        if others < BUSY:
            break
        print(f"  {name}: others used {others:.2f} cores", flush=True)
    _, lines = min(tries, key=lambda t: t[0])
    for line in lines:
        print(f"  {name}: {line}", flush=True)
    return {
        key: value for line in lines for key, value in line.items() if name != "nanogpt" or key != "seconds" or "valid" not in line
    }


def main(_) -> None:
    """Measures both sides in turn."""
    print(time.strftime("%Y-%m-%d"), "·", pathlib.Path(TEXT.value).name)
    ends: dict[str, list[dict]] = {name: [] for name in SIDES.value}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(ROUNDS.value):
            for name in SIDES.value if index % 2 == 0 else SIDES.value[::-1]:
                ends[name].append(run(name, index, pathlib.Path(folder)))
    for name, rounds in ends.items():
        losses = [end["valid"] for end in rounds]
        reached = sum(loss <= TARGET.value for loss in losses)
        seconds = statistics.median(end["seconds"] for end in rounds)
        print(
            f"{name:8}  {seconds:6.1f} s   whole validation split {statistics.median(losses):.4f} "
            f"[{min(losses):.4f}, {max(losses):.4f}]   at or below {TARGET.value}: {reached} of {len(losses)}"
        )
    if len(ends) == 2:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(ends["llm_jax"], ends["nanogpt"], strict=True)]
        print(f"our time / the reference's: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


if __name__ == "__main__":
    app.run(main)
