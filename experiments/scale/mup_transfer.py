"""Does the best learning rate stay where it is when a model grows wider, with µP and without?

    python -m llm_jax run --experiment=experiments/scale/mup_transfer.py --workdir=runs/transfer

Widths of 1, 2, 4 and 8 times a base, in µP and in the standard parametrization, over one grid of rates in steps of two. The
sensitivity picture of the report is figure 1 of Yang et al. 2022 ("Tensor Programs V"); its claims are about how far the best rate
moves from the base to the widest, in powers of two, for each tuning seed. About 10 minutes on 2 quiet cores, by estimate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core.config import override
from llm_jax.lab import Ablation, Arms, Claim, Steadier, log_grid, presets
from llm_jax.models.mup import MuP

RATE = "optimizer.learning_rate"


def arms(widths: Sequence[int], *, heads: Sequence[int] = ()) -> dict[str, dict[str, Any]]:
    """Every width twice; the first is the base, where both are the same model. heads: of each width, where they are as wide."""
    found = {}
    mup = MuP(base_width=widths[0], base_heads=heads[0] if heads else None)
    for kind, how in (("mup", mup), ("standard", None)):
        for place, width in enumerate(widths):
            own = {"model.attention.heads": heads[place]} if heads else {}
            found[f"{kind}-{width // widths[0]}x"] = {"model.width": width, "model.mup": how, **own}
    return found


FULL: Mapping[str, Any] = presets.FULL | {
    "train.steps": 4_000,
    "model.depth": 12,
    "nuisance": {RATE: log_grid(5e-4, 3.2e-2, 7)},
    "tuning_seeds": 2,
    "seeds": 1,
    "arms": arms((256, 512, 1024, 2048), heads=(2, 4, 8, 16)),
}

ablation = Ablation(
    question="Does the best learning rate stay where it is when a model grows wider?",
    base=override(presets.nano(steps=200), {"train.steps": 150, "evaluation.every": 150, "checkpoints.every": 150}),
    scientific=Arms(arms((16, 32, 64, 128))),
    nuisance={RATE: log_grid(2e-3, 6.4e-2, 6)},
    tuning_seeds=3,
    seeds=2,
    metric="valid/bits_per_byte",
    baseline="standard-1x",
    claims=[
        Steadier(
            "With µP the best learning rate moves less, by a factor of two at least, from the base to 8 times its width",
            better="mup-8x", since="mup-1x", than="standard-8x", than_since="standard-1x", nuisance=RATE, by=1.0,
        ),
        Claim("With µP wider is better", better="mup-8x", than="mup-1x"),
        Claim("Tuned alike, µP is better at 8 times the width", better="mup-8x", than="standard-8x"),
    ],
    scales={
        "smoke": presets.SMOKE | {"nuisance": {RATE: log_grid(8e-3, 3.2e-2, 3)}, "tuning_seeds": 2, "model.depth": 1},
        "small": {},
        "full": FULL,
    },
)  # fmt: skip
