"""Which loss should a language model be trained by, and which probabilities can then be believed?

    python -m llm_jax run --experiment=experiments/c16_losses.py --workdir=runs/c16

Every arm is scored by bits per byte, by accuracy, and by how far the probability of its most probable byte is from how often that
byte comes (expected calibration error). Cross-entropy and Brier are proper: no other probabilities than the true ones lower them.
Label smoothing and focal loss are not, and flatten what they learn; the squared error of logits learns no probabilities at all.
Literature: Szegedy et al. 2016 (label smoothing), Chowdhery et al. 2022 (z-loss), Lin et al. 2017 (focal), Mukhoti et al. 2020
(focal calibrates), Brier 1950, Hui & Belkin 2021 (squared error).
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.components import Brier, Focal, NextToken, SquaredError

ERROR = "valid/calibration_error"

ablation = Ablation(
    question="Which loss gives the best predictions, and which the most honest ones?",
    base=presets.nano(),
    scientific={
        "objective": {
            "cross-entropy": NextToken(),
            "smoothing": NextToken(smoothing=0.1),
            "z-loss": NextToken(z_loss=1e-4),
            "focal": NextToken(criterion=Focal(gamma=2.0)),
            "brier": NextToken(criterion=Brier()),
            "squared-error": NextToken(criterion=SquaredError()),
        }
    },
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=8,
    baseline="cross-entropy",
    claims=[
        Claim("Label smoothing costs likelihood", better="cross-entropy", than="smoothing"),
        Claim("The z-loss costs no likelihood worth 0.02 bits a byte", better="z-loss", than="cross-entropy", by=-0.02),
        Claim("Cross-entropy gives a better likelihood than the Brier score", better="cross-entropy", than="brier"),
        Claim("Focal loss is worse calibrated than cross-entropy", better="cross-entropy", than="focal", metric=ERROR),
        Claim("Label smoothing is worse calibrated than cross-entropy", better="cross-entropy", than="smoothing", metric=ERROR),
        Claim(
            "The squared error of logits predicts the next byte as often", better="squared-error", than="cross-entropy",
            metric="valid/accuracy", by=-0.01,
        ),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)  # fmt: skip
