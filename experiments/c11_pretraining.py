"""How much text of its own does a task need, after training on other text first?

    python -m llm_jax run --experiment=experiments/c11_pretraining.py --workdir=runs/c11

The task is English: the language reference of Python, of which a model gets 28, 88 or 413 kB ("little", "more", "all"). Half of the
arms read it in all of their 400 steps, 15, 5 or 1 times over; the others read Python's sources for the first 300 steps, a mixture
whose weights go from one source to the other, so that all train for as long. What is said: pretraining makes fine-tuning need less
data (Howard & Ruder 2018; Hernandez et al. 2021, "Scaling laws for transfer", who pretrain on English and fine-tune on Python).
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.data.corpora import Corpus, Jsonl, Mixture, Source, StandardLibrary
from llm_jax.lab import Ablation, Arms, Claim, log_grid, presets

PRETRAINING = 0.75  # of all steps


def arms(other: Corpus, task: Mapping[str, Corpus]) -> dict[str, dict[str, Any]]:
    """With and without pretraining, for each amount of the task's text."""
    until = Source("other", other, weight=((PRETRAINING, 1.0), (PRETRAINING + 1e-3, 0.0)))
    since = ((PRETRAINING, 0.0), (PRETRAINING + 1e-3, 1.0))
    alone = {f"scratch, {amount}": Mixture((Source("task", text),)) for amount, text in task.items()}
    after = {f"pretrained, {amount}": Mixture((until, Source("task", text, weight=since))) for amount, text in task.items()}
    return {arm: {"data.corpus": corpus} for arm, corpus in (alone | after).items()}


ENGLISH = {
    amount: StandardLibrary(kind="prose", megabytes=megabytes)
    for amount, megabytes in (("little", 0.08), ("more", 0.14), ("all", None))
}
OWN = {amount: Jsonl(path=f"task/{amount}.jsonl") for amount in ENGLISH}  # a folder beside the run, at scale `full`
CODE = StandardLibrary(kind="code")

ablation = Ablation(
    question="How much text of its own does a task need, after training on other text first?",
    base=presets.nano(),
    scientific=Arms(arms(CODE, ENGLISH)),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=8,
    metric="valid/bits_per_byte@task",
    baseline="scratch, all",
    claims=[
        Claim("Pretraining helps with little text", better="pretrained, little", than="scratch, little"),
        Claim("Pretraining helps with all of it", better="pretrained, all", than="scratch, all"),
        Claim(
            "After pretraining a fifteenth of the text does as well, to 0.02 bits a byte",
            better="pretrained, little",
            than="scratch, all",
            by=-0.02,
        ),
        Claim("Without pretraining more text helps", better="scratch, all", than="scratch, little"),
    ],
    scales={
        "smoke": presets.SMOKE,
        "small": {},
        "full": presets.FULL | {"arms": arms(presets.FULL["data.corpus"], OWN)},
    },
)
