"""Which activation, at equal parameters, and is the net a straight line without one?

    python -m llm_jax run --experiment=experiments/c05_activations.py --workdir=runs/c05

Plain feed-forward networks of four times the width and gated ones of 8/3 have as many parameters. Literature: Hendrycks &
Gimpel 2016 (GELU), So et al. 2021 (squared ReLU), Shazeer 2020 (gated linear units).
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.components import Dense, Gated

PLAIN = ("identity", "relu", "squared_relu", "gelu", "silu", "tanh", "sigmoid")
GATED = {"glu": "sigmoid", "reglu": "relu", "geglu": "gelu", "swiglu": "silu", "bilinear": "identity"}

ablation = Ablation(
    question="Which activation function gives the lowest loss at equal parameters?",
    base=presets.nano(),
    scientific={
        "model.ffn": {name: Dense(activation=name) for name in PLAIN}
        | {name: Gated(activation=activation) for name, activation in GATED.items()}
    },
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="gelu",
    claims=[
        Claim("A network without non-linearity in its feed-forward part is worse", better="relu", than="identity"),
        Claim("GELU beats ReLU", better="gelu", than="relu"),
        Claim("SwiGLU beats GELU at equal parameters", better="swiglu", than="gelu"),
        Claim("Squared ReLU beats ReLU", better="squared_relu", than="relu"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)
