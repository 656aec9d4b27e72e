"""What does normalization buy: a lower loss, or a wider range of learning rates that work?

    python -m llm_jax run --experiment=experiments/c08_normalization.py --workdir=runs/c08

LayerNorm, RMSNorm and none, before, after and around each branch, at six layers; the report's sensitivity picture shows the loss
over the learning rate, which is what norms are said to flatten. Literature: Ba et al. 2016, Zhang & Sennrich 2019, Xiong et al.
2020 (pre-norm), Henry et al. 2020 (QK-norm).
"""

from llm_jax.core.config import override
from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import LayerNorm, NoNorm, RMSNorm

ablation = Ablation(
    question="Which norm, where, and what does it do to the range of learning rates that work?",
    base=override(presets.nano(), {"model.depth": 6}),
    scientific=Arms(
        {
            "layernorm-pre": {"model.norm": LayerNorm()},
            "rmsnorm-pre": {"model.norm": RMSNorm()},
            "layernorm-post": {"model.norm": LayerNorm(), "model.placement": "post"},
            "rmsnorm-sandwich": {"model.norm": RMSNorm(), "model.placement": "sandwich"},
            "rmsnorm-qk": {"model.norm": RMSNorm(), "model.attention.qk_norm": RMSNorm()},
            "none": {"model.norm": NoNorm()},
        }
    ),
    nuisance={"optimizer.learning_rate": log_grid(1e-3, 2.43e-1, 6)},
    seeds=4,
    baseline="none",
    claims=[
        Claim("LayerNorm before each branch beats none", better="layernorm-pre", than="none"),
        Claim("RMSNorm beats LayerNorm", better="rmsnorm-pre", than="layernorm-pre"),
        Claim("Norms before branches beat norms after them", better="layernorm-pre", than="layernorm-post"),
        Claim("QK-norm helps", better="rmsnorm-qk", than="rmsnorm-pre"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)
