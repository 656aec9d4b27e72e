"""Which optimizer wins when each one is tuned?

    python -m llm_jax run --experiment=experiments/c15_optimizers.py --workdir=runs/c15

Every optimizer is tuned over one grid of learning rates, wide enough to hold each one's best: sign-like updates want less,
plain gradients more. Literature: Kaddour et al. 2023 (no train no gain), Wen et al. 2025 (fantastic optimizers), whose finding
is that most gains over a well-tuned AdamW shrink once everything is tuned alike. About 15 minutes on 2 cores. Obtained
(2026-11-24): Muon, SOAP and schedule-free AdamW beat AdamW in 400 steps, the others lose to it; see LOG.md.
"""

from llm_jax.lab import Ablation, Arms, Claim, chain, log_grid, presets
from llm_jax.optim.optimizers import SGD, SOAP, Adafactor, Adam, AdamW, Lion, Momentum, Muon, ScheduleFreeAdamW, Sophia
from llm_jax.optim.schedules import Constant

ablation = Ablation(
    question="Which optimizer wins when each one is tuned over the same learning rates?",
    base=presets.nano(),
    scientific=chain(
        {
            "optimizer": {
                "adamw": AdamW(),
                "sgd": SGD(),
                "momentum": Momentum(),
                "adam": Adam(),
                "adafactor": Adafactor(),
                "lion": Lion(),
                "muon": Muon(),
                "soap": SOAP(),
                "sophia": Sophia(),
            }
        },
        Arms({"schedule-free": {"optimizer": ScheduleFreeAdamW(), "schedule": Constant()}}),  # the others fall in a cosine
    ),
    nuisance={"optimizer.learning_rate": log_grid(3e-4, 3e-1, 7)},
    seeds=8,
    baseline="adamw",
    metric="valid/bits_per_byte",
    claims=[
        Claim("Muon beats AdamW", better="muon", than="adamw"),
        Claim("SOAP beats AdamW", better="soap", than="adamw"),
        Claim("Lion beats AdamW", better="lion", than="adamw"),
        Claim("Sophia beats AdamW", better="sophia", than="adamw"),
        Claim("AdamW beats SGD with momentum", better="adamw", than="momentum"),
        Claim("Momentum beats plain SGD", better="momentum", than="sgd"),
        Claim("Schedule-free AdamW beats AdamW with cosine decay", better="schedule-free", than="adamw"),
    ],
    scales={
        "smoke": presets.SMOKE | {"model.depth": 1, "nuisance": {"optimizer.learning_rate": (1e-3, 1e-2)}},
        "small": {},
        "full": {path: value for path, value in presets.FULL.items() if path not in ("nuisance", "tuning_seeds")}
        | {"model.width": 768, "model.depth": 12, "model.attention.heads": 12},
    },
)
