"""Do tokens of a kind come to lie close to each other, and does it matter how the table is made?

    python -m llm_jax run --experiment=experiments/c02_embeddings.py --workdir=runs/c02

Byte-pair tokens of Python's standard library, of which 5 nearest neighbours in the table of embeddings are looked at, by cosine:
"neighbour_purity" is the share of them that are of the same kind (keyword, number, word, capitalized word, punctuation, space),
"neighbour_chance" what it is of a shuffled table. Tied and untied tables, tables that are not scaled, and factored ones, each tuned
over the same learning rates by the loss, and a table that is left as it was drawn. Literature: Mikolov et al. 2013, Press & Wolf
2017 (tied), Vaswani et al. 2017 (scaled), Lan et al. 2020 (factored).
"""

from llm_jax.core.config import override
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import Embed

UNTIED = {"model.head.tied": False}

ablation = Ablation(
    question="Do similar tokens lie close, in which tables, and after how many steps?",
    base=override(
        presets.nano(), {"tokenizer": SentencePiece(vocabulary=1024), "evaluation.neighbours": 5, "evaluation.every": 50}
    ),
    scientific=Arms(
        {
            "tied": {},
            "untied": UNTIED,
            "not-scaled": {"model.embedding": Embed(scaled=False)},
            "factored": {"model.embedding": Embed(rank=16)},
            "untrained": {"train.steps": 1, "train.log_every": 1, "evaluation.every": 1},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="tied",
    metric="valid/neighbour_purity",
    mode="max",
    tuning_metric="valid/loss",
    claims=[
        Claim("Tokens of a kind come to lie close", better="tied", than="untrained"),
        Claim("A tied table learns them better than an untied one", better="tied", than="untied"),
        Claim("A factored table puts them closer", better="factored", than="tied"),
        Claim("Tying lowers the loss", better="tied", than="untied", metric="valid/bits_per_byte"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)
