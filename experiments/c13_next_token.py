"""Does a model predict the next byte better for having to say more: the bytes after it, or a middle between two ends?

    python -m llm_jax run --experiment=experiments/c13_next_token.py --workdir=runs/c13

All arms are scored by the next byte alone, from left to right: bits a byte, how often it is the most probable one or among the
five, and how far probabilities are from how often things come (calibration error). Arms: the next byte alone; one and three bytes
more, each by a layer that is left out afterwards (MultiToken); the next byte alone with as many layers as three more bytes take,
which stay; documents of which half have their middle moved to the end (FillInTheMiddle). Literature: Gloeckle et al. 2024 and
DeepSeek-V3 2024, §2.2 (several tokens ahead; both find a gain in large models, the former a loss in small ones), Bavarian et al.
2022 ("FIM for free").
"""

from llm_jax.lab import Ablation, Arms, Claim, log_grid, presets
from llm_jax.lab.components import FillInTheMiddle, MultiToken

ablation = Ablation(
    question="Does saying more than the next token help, or cost, its prediction?",
    base=presets.nano(),
    scientific=Arms(
        {
            "next": {},
            "one ahead": {"model.head": MultiToken(ahead=1)},
            "three ahead": {"model.head": MultiToken(ahead=3)},
            "deeper": {"model.depth": 5},
            "middles": {"objective": FillInTheMiddle()},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=8,
    baseline="next",
    claims=[
        Claim("One byte ahead helps", better="one ahead", than="next"),
        Claim("Three bytes ahead cost a small model some of the next", better="next", than="three ahead"),
        Claim("Layers that stay help more than layers that teach", better="deeper", than="three ahead"),
        Claim("Moving middles costs no likelihood worth 0.02 bits a byte", better="middles", than="next", by=-0.02),
        Claim(
            "Predicting further makes probabilities more honest", better="three ahead", than="next",
            metric="valid/calibration_error",
        ),
    ],
    scales={
        "smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}},
        "small": {},
        "full": presets.FULL | {"arms": {"deeper": {"model.depth": 27}}},
    },
)  # fmt: skip
