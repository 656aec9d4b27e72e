"""Does the Transformer reach a lower loss than recurrence, and how soon?

    python -m llm_jax run --experiment=experiments/c04_transformer.py --workdir=runs/c04

The decoder as we would build it today, the original of 2017 (sinusoids, post-norm, ReLU), the same blocks with an LSTM in
place of attention, a plain stack of LSTM layers, and no mixing at all, each tuned over the same learning rates. The report
shows loss over tokens and over seconds. Literature: Vaswani et al. 2017, Hochreiter & Schmidhuber 1997. Obtained (2026-11-26): the
blocks make the difference; in them an LSTM does as well as attention in rows of 128 bytes; see LOG.md.
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import LSTM, Dense, NoFeedForward, NoMixing, NoNorm, NoPosition, NoResidual, Sinusoidal

ORIGINAL = {
    "model.position": Sinusoidal(),
    "model.placement": "post",
    "model.ffn": Dense(activation="relu", bias=True),
    "model.attention.bias": True,
}
PLAIN_LSTM = {
    "model.attention": LSTM(),
    "model.position": NoPosition(),
    "model.ffn": NoFeedForward(),
    "model.norm": NoNorm(),
    "model.residual": NoResidual(),
    "model.depth": 3,  # about as many parameters as two Transformer layers
}

ablation = Ablation(
    question="Does attention reach a lower loss than recurrence at equal tokens, and at equal time?",
    base=presets.nano(),
    scientific=Arms(
        {
            "transformer": {},
            "original": ORIGINAL,
            "lstm-blocks": {"model.attention": LSTM(), "model.position": NoPosition()},
            "lstm": PLAIN_LSTM,
            "no-mixing": {"model.attention": NoMixing(), "model.position": NoPosition()},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(1e-3, 2.7e-2, 4)},
    seeds=4,
    baseline="lstm",
    claims=[
        Claim("The Transformer beats a stack of LSTM layers", better="transformer", than="lstm"),
        Claim("Attention beats recurrence in the same blocks", better="transformer", than="lstm-blocks"),
        Claim("Today's Transformer beats the original", better="transformer", than="original"),
        Claim("Mixing is needed", better="lstm", than="no-mixing"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (3e-3,)}}, "small": {}, "full": presets.FULL},
)
