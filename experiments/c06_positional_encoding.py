"""Which positional scheme still works past the length it was trained on, and is a scheme needed at all?

    python -m llm_jax run --experiment=experiments/c06_positional_encoding.py --workdir=runs/c06

Six schemes and none, each tuned over the same learning rates, trained on sequences of 64 bytes and scored on sequences of 1,
2, 4 and 8 times that length. Literature: Vaswani et al. 2017 (sinusoidal), Press et al. 2022 (ALiBi), Su et al. 2021 (RoPE),
Raffel et al. 2020 (T5 bias), Kazemnejad et al. 2023 (no positions). About 11 minutes on 2 cores. Obtained (2026-11-24): ALiBi keeps
its loss to 8×, RoPE is best up to 2× and level with it at 4×; see LOG.md.
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias

TRAINED, LONGEST = 64, 8

ablation = Ablation(
    question="Which positional scheme still works past the length it was trained on?",
    base=presets.nano(sequence_length=TRAINED, lengths=(1, 2, 4, LONGEST)),
    scientific={
        "model.position": {
            "none": NoPosition(),
            "sinusoidal": Sinusoidal(),
            "learned": Learned(max_length=TRAINED * LONGEST),
            "rope": Rope(),
            "half-rope": Rope(fraction=0.5),
            "alibi": Alibi(),
            "t5": T5Bias(),
        }
    },
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    tuning_seeds=2,
    seeds=8,
    baseline="sinusoidal",
    metric="valid/bits_per_byte@4x",
    tuning_metric="valid/bits_per_byte",
    claims=[
        Claim("ALiBi extrapolates better than sinusoidal", better="alibi", than="sinusoidal"),
        Claim("ALiBi extrapolates better than RoPE", better="alibi", than="rope"),
        Claim("T5's relative bias extrapolates better than RoPE", better="t5", than="rope"),
        Claim("No positions extrapolate better than RoPE", better="none", than="rope"),
        Claim("RoPE beats no positions at the trained length", better="rope", than="none", metric="valid/bits_per_byte"),
    ],
    scales={
        "smoke": presets.SMOKE | {"model.depth": 1, "nuisance": {"optimizer.learning_rate": (2e-3, 8e-3)}},
        "small": {},
        "full": presets.FULL
        | {"model.attention.heads": 16, "arms": {"learned": {"model.position": Learned(max_length=1024 * LONGEST)}}},
    },
)
