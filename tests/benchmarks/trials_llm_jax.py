"""Trains trials with llm_jax: `python trials_llm_jax.py SIZE TEXT STEPS RATESxSEEDS LARGEST`.

The laboratory's own runner does it, with records, evaluation, checkpoints and results on disk; only the report is left
out. LARGEST: trials in one program, at most. Prints the mean of the final validation losses.
"""

import sys
import tempfile

from shapes import SHAPES, rates_and_seeds

from llm_jax.core import platform


def main(size: str, text: str, steps: int, trials: str, largest: int) -> None:
    """Runs the ablation of one hyper-parameter."""
    platform.setup()
    from gpt2_llm_jax import gpt2

    from llm_jax.core.config import override
    from llm_jax.data.corpora import TextFiles
    from llm_jax.data.tokenizers import Characters
    from llm_jax.lab.experiment import Ablation
    from llm_jax.lab.runner import Runner
    from llm_jax.lab.workfolder import WorkFolder

    rates, seeds = rates_and_seeds(trials)
    base = override(gpt2(SHAPES[size], steps=steps, log_every=50), {"data.corpus": TextFiles(path=text), "tokenizer": Characters()})
    arms = {"optimizer.learning_rate": {f"{rate:g}": rate for rate in rates}}
    ablation = Ablation(question="Which learning rate?", base=base, scientific=arms, seeds=len(seeds))
    with tempfile.TemporaryDirectory() as folder:
        results = Runner(ablation, WorkFolder(folder + "/work"), largest=largest).run()
    losses = [result["metrics"]["valid/loss"] for result in results]
    assert len(losses) == len(rates) * len(seeds)
    print(sum(losses) / len(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
