"""What does the feed-forward part add, and how should parameters be shared between it and depth?

    python -m llm_jax run --experiment=experiments/c09_feed_forward.py --workdir=runs/c09

Hidden units of 1, 2, 4 and 10 times the width, or none, in as many layers as keep the parameters of all layers equal; gated
ones; and the branches side by side. Literature: Vaswani et al. 2017, Shazeer 2020 (gated), Wang & Komatsuzaki 2021 (parallel),
Dong et al. 2021 (attention alone loses rank with depth).
"""

from llm_jax.core.config import override
from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import Dense, Gated, NoFeedForward

# a layer has (4 + 2·ratio)·width² entries, all layers 48·width²
ablation = Ablation(
    question="How wide should the feed-forward part be at equal parameters, and is it needed?",
    base=override(presets.nano(), {"model.depth": 4}),
    scientific=Arms(
        {
            "ratio-4": {},
            "ratio-1": {"model.ffn": Dense(ratio=1.0), "model.depth": 8},
            "ratio-2": {"model.ffn": Dense(ratio=2.0), "model.depth": 6},
            "ratio-10": {"model.ffn": Dense(ratio=10.0), "model.depth": 2},
            "none": {"model.ffn": NoFeedForward(), "model.depth": 12},
            "gated": {"model.ffn": Gated()},
            "parallel": {"model.placement": "parallel"},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="ratio-4",
    claims=[
        Claim("Feed-forward networks add what attention alone lacks", better="ratio-4", than="none"),
        Claim("Four times the width beats once the width at equal parameters", better="ratio-4", than="ratio-1"),
        Claim("Gating helps at equal parameters", better="gated", than="ratio-4"),
        Claim("Branches in turn beat branches side by side", better="ratio-4", than="parallel"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}},
)
