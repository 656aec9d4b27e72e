"""How much text of its own does a task need, after training on other text first?

    python -m llm_jax run --experiment=experiments/c11_pretraining.py --workdir=runs/c11

The task is English: the language reference of Python, of which a model gets 28, 88 or 413 kB ("little", "more", "all"). Half of the
arms read it in all of their 800 steps, 30, 9 or 2 times over; the others read Python's sources in the first half and the task in
the second, 15, 5 or 1 times: a mixture whose weights go from one source to the other, so that all train for as long. What is said:
pretraining makes fine-tuning need less data (Howard & Ruder 2018; Hernandez et al. 2021, "Scaling laws for transfer", who pretrain
on English and fine-tune on Python). About 8 minutes on 2 cores. Obtained (2026-11-26): it helps with 28 kB, not with 88, and costs
with all; see LOG.md.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.data.corpora import Corpus, Jsonl, Mixture, Source, StandardLibrary
from llm_jax.lab import Ablation, Arms, Claim, log_grid, presets

PRETRAINING = 0.5  # of all steps


def arms(other: Corpus, task: Corpus, amounts: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
    """With and without pretraining, for each amount of the task's text, in rows."""
    until = Source("other", other, weight=((PRETRAINING, 1.0), (PRETRAINING + 1e-3, 0.0)))
    since = ((PRETRAINING, 0.0), (PRETRAINING + 1e-3, 1.0))
    found = {}
    for amount, rows in amounts.items():
        found[f"scratch-{amount}"] = Mixture((Source("task", task, rows=rows),))
        found[f"pretrained-{amount}"] = Mixture((until, Source("task", task, rows=rows, weight=since)))
    return {arm: {"data.corpus": corpus} for arm, corpus in found.items()}


SMALL = arms(StandardLibrary(kind="code"), StandardLibrary(kind="prose"), {"little": 215, "more": 684, "all": None})
FULL = arms(Jsonl(path="corpus"), Jsonl(path="task"), {"little": 1_000, "more": 30_000, "all": None})

ablation = Ablation(
    question="How much text of its own does a task need, after training on other text first?",
    base=presets.nano(steps=800),
    scientific=Arms(SMALL),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    metric="valid/bits_per_byte@task",
    baseline="scratch-all",
    claims=[
        Claim("Pretraining helps with little text", better="pretrained-little", than="scratch-little"),
        Claim("Pretraining helps with all of it", better="pretrained-all", than="scratch-all"),
        Claim(
            "After pretraining a fifteenth of the text does as well, to 0.02 bits a byte",
            better="pretrained-little", than="scratch-all", by=-0.02,
        ),
        Claim("Without pretraining more text helps", better="scratch-all", than="scratch-little"),
    ],
    scales={"smoke": presets.SMOKE, "small": {}, "full": presets.FULL | {"arms": FULL}},
)  # fmt: skip
