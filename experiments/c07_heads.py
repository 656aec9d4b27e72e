"""Do several heads see what one cannot, and what do fewer keys and values cost?

    python -m llm_jax run --experiment=experiments/c07_heads.py --workdir=runs/c07

One to eight query heads at equal parameters (a head is as wide as the width over their number), then eight with two and with one
key-value heads, and latent attention. Numbers cached of each token a layer: 128 for all of the first, 32 (GQA), 16 (MQA), 24
(MLA). Literature: Vaswani et al. 2017, Shazeer 2019 (MQA), Ainslie et al. 2023 (GQA), DeepSeek-V2 2024 (MLA).
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.components import MLA, Attention

ablation = Ablation(
    question="How does the number of heads, and of key-value heads, change the loss?",
    base=presets.nano(),
    scientific={
        "model.attention": {f"heads-{n}": Attention(heads=n) for n in (1, 2, 4, 8)}
        | {"gqa-2": Attention(heads=8, kv_heads=2), "mqa": Attention(heads=8, kv_heads=1)}
        | {"mla": MLA(heads=8, kv_rank=20, nope_dim=8, rope_dim=4, value_dim=8)}
    },
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=8,
    baseline="heads-1",
    claims=[
        Claim("Four heads beat one at equal parameters", better="heads-4", than="heads-1"),
        Claim("Eight key-value heads beat one", better="heads-8", than="mqa"),
        Claim("Latent attention beats one key-value head at about the same cache", better="mla", than="mqa"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)
