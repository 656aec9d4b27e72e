"""Do residual connections keep deep networks trainable?

    python -m llm_jax run --experiment=experiments/c10_residual.py --workdir=runs/c10

On and off at 2 and at 16 layers, and at 16 scaled by 1/√(2·depth), ReZero, and hyper-connections. Literature: He et al. 2016,
Bachlechner et al. 2020 (ReZero), Zhu et al. 2025 (hyper-connections).
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import HyperConnections, NoResidual, Residual, ReZero, Scaled

DEEP = {"model.depth": 16}

ablation = Ablation(
    question="What do residual connections do for networks of 2 and of 16 layers?",
    base=presets.nano(steps=200),
    scientific=Arms(
        {
            "2-on": {"model.residual": Residual()},
            "2-off": {"model.residual": NoResidual()},
            "16-on": DEEP | {"model.residual": Residual()},
            "16-off": DEEP | {"model.residual": NoResidual()},
            "16-scaled": DEEP | {"model.residual": Scaled()},
            "16-rezero": DEEP | {"model.residual": ReZero()},
            "16-hyper": DEEP | {"model.residual": HyperConnections(rate=2)},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(1e-3, 9e-3, 3)},
    seeds=3,
    baseline="2-on",
    claims=[
        Claim("Sixteen layers need residual connections", better="16-on", than="16-off"),
        Claim("Two layers need them too", better="2-on", than="2-off"),
        Claim("Depth pays with residual connections", better="16-on", than="2-on"),
        Claim("Depth pays without them", better="16-off", than="2-off"),
        Claim("Hyper-connections beat the plain residual", better="16-hyper", than="16-on"),
        Claim("ReZero beats the plain residual", better="16-rezero", than="16-on"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}},
)
