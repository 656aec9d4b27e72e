"""How does the loss fall with the size of the model and the number of its tokens, and how is a budget of compute best spent?

    python -m llm_jax run --experiment=experiments/scale/scaling_law.py --workdir=runs/sizes
    python -m llm_jax fit --workdir=runs/sizes --compute=1e14

Four sizes × three token budgets, each with a schedule of its own length, which a law of both needs (Hoffmann et al. 2022). Sizes
differ in width alone; µP (Yang et al. 2022) carries one learning rate, that of the narrowest, to all of them (`mup_transfer.py`
finds it), so that the law is not one of how badly the wide ones are tuned. `fit` predicts the largest run from the others.
Literature: Kaplan et al. 2020; Hoffmann et al. 2022, and what Besiroglu et al. 2024 found in their fit. About 12 minutes on 2
quiet cores, by estimate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.config import override
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab import Ablation, Arms, Claim, presets
from llm_jax.models.mup import MuP

NAMES = ("xs", "s", "m", "l")
BUDGETS = ("few", "more", "many")
BASE = 32  # width that the learning rate is for


def arms(widths: Sequence[int], steps: Sequence[int], *, head: int | None = None) -> dict[str, dict[str, Any]]:
    """Every width with every number of steps. head: channels of a head, so that wider models have more; None: as many heads."""
    found = {}
    for name, width in zip(NAMES, widths, strict=True):
        for budget, count in zip(BUDGETS, steps, strict=True):
            heads = {} if head is None else {"model.attention.heads": width // head}
            ends = {"train.steps": count, "evaluation.every": count, "checkpoints.every": count}
            found[f"{name}-{budget}"] = {"model.width": width, **heads, **ends}
    return found


FULL: Mapping[str, Any] = {  # 0.09 to 1 B parameters, 3 to 29 B tokens: about 5e20 FLOPs in all
    path: value for path, value in presets.FULL.items() if path not in ("nuisance", "tuning_seeds", "train.steps")
} | {
    "model.width": 512,
    "tokenizer": SentencePiece(vocabulary=32_000),
    "data.sequence_length": 2048,
    "data.batch_size": 512,
    "model.mup": MuP(base_width=256, base_heads=2),
    "optimizer.learning_rate": 4e-3,
    "seeds": 1,
    "arms": arms((512, 768, 1280, 1792), (3_000, 9_000, 28_000), head=128),
}

ablation = Ablation(
    question="How does the loss fall with parameters and tokens?",
    base=override(presets.nano(), {"model.mup": MuP(base_width=BASE), "optimizer.learning_rate": 1e-2}),
    scientific=Arms(arms((32, 64, 128, 224), (100, 300, 900))),  # FLOPs in steps of three: diagonals are IsoFLOP profiles
    seeds=2,
    metric="valid/loss",
    baseline="l-many",
    claims=[
        Claim("With many tokens more parameters help", better="l-many", than="xs-many"),
        Claim("A small model with many tokens beats a large one with few", better="xs-many", than="l-few"),
    ],
    scales={
        "smoke": {
            "evaluation.bytes": 16_384,
            "train.log_every": 10,
            "model.depth": 1,
            "arms": arms((32, 64, 128, 224), (10, 30, 90)),
        },
        "small": {},
        "full": FULL,
    },
)
