"""Trains trials with llm_jax: `python trials_llm_jax.py SIZE TEXT STEPS RATESxSEEDS LARGEST [TRIAL]`.

The laboratory's own runner does it, with records, evaluation, checkpoints and results on disk; only the report is left
out. LARGEST: trials in one program, at most; 0 starts a process for every trial, as one does without populations. TRIAL: the
number of the only one to train. Prints the mean of the final validation losses.
"""

import itertools
import subprocess
import sys
import tempfile

from shapes import SHAPES, rates_and_seeds

from llm_jax.core import platform


def main(size: str, text: str, steps: int, trials: str, largest: int, trial: int | None = None) -> None:
    """Runs the ablation of one hyper-parameter."""
    rates, seeds = rates_and_seeds(trials)
    if largest == 0:
        losses = [_alone(index) for index in range(len(rates) * len(seeds))]
        print(sum(losses) / len(losses))
        return
    platform.setup()
    from gpt2_llm_jax import gpt2

    from llm_jax.core.config import override
    from llm_jax.data.corpora import TextFiles
    from llm_jax.data.tokenizers import Characters
    from llm_jax.lab.experiment import Ablation
    from llm_jax.lab.runner import Runner
    from llm_jax.lab.workfolder import WorkFolder

    if trial is not None:
        rates, seeds = ([value] for value in list(itertools.product(rates, seeds))[trial])
    base = override(
        gpt2(SHAPES[size], steps=steps, log_every=50),
        {"data.corpus": TextFiles(path=text), "tokenizer": Characters(), "seed": seeds[0]},
    )
    arms = {"optimizer.learning_rate": {f"{rate:g}": rate for rate in rates}}
    ablation = Ablation(question="Which learning rate?", base=base, scientific=arms, seeds=len(seeds))
    with tempfile.TemporaryDirectory() as folder:
        results = Runner(ablation, WorkFolder(folder + "/work"), largest=largest).run()
    losses = [result["metrics"]["valid/loss"] for result in results]
    assert len(losses) == len(rates) * len(seeds)
    print(sum(losses) / len(losses))


def _alone(index: int) -> float:
    command = [sys.executable, __file__, *sys.argv[1:5], "1", str(index)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], *map(int, sys.argv[5:]))
