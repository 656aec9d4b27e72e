"""Does attention recall what recurrent networks forget, however far back it was told?

    python -m llm_jax run --experiment=experiments/c03_attention.py --workdir=runs/c03

Associative recall: rows of 42 slots, facts (letter, digit) and questions about earlier ones. Full attention, attention to the last
24 tokens (8 slots) only, an LSTM in the same blocks, and no mixing at all, each tuned over the same learning rates. The metric is
the share of digits that are recalled, by how many slots ago they were told; chance is 0.1. Literature: Ba et al. 2016, Jelassi et
al. 2024, Arora et al. 2024 ("Zoology").
"""

from llm_jax.core.config import override
from llm_jax.data.tasks import Recall
from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import LSTM, NextToken, NoMixing, NoPosition, SlidingWindow

LOCAL = {"model.attention.mask": SlidingWindow(window=24)}

ablation = Ablation(
    question="Which mixers recall a fact that was told 1, 2, … 32 facts ago?",
    base=override(
        presets.nano(steps=1600),
        {"data.corpus": Recall(), "objective": NextToken(after=ord("?"), skip=1), "evaluation.every": 100, "train.log_every": 20},
    ),
    scientific=Arms(
        {
            "attention": {},
            "local": LOCAL,
            "lstm": {"model.attention": LSTM(), "model.position": NoPosition()},
            "no-mixing": {"model.attention": NoMixing(), "model.position": NoPosition()},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(1e-3, 9e-3, 3)},
    seeds=4,
    metric="valid/accuracy@32-facts",
    mode="max",
    tuning_metric="valid/loss",
    claims=[
        Claim("Attention recalls from further back than an LSTM", better="attention", than="lstm"),
        Claim("Full attention recalls from further back than local attention", better="attention", than="local"),
        Claim("An LSTM recalls something", better="lstm", than="no-mixing", metric="valid/accuracy@1-facts"),
        Claim("Local attention beats an LSTM within its window", better="local", than="lstm", metric="valid/accuracy@4-facts"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (3e-3,)}}, "small": {}},
)
