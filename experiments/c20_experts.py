"""Do more parameters help at equal compute?

    python -m llm_jax run --experiment=experiments/c20_experts.py --workdir=runs/c20

A dense feed-forward network against eight experts of half its units of which each token uses two: as many multiplications, four
times the parameters. Routers by softmax and by sigmoid with a loss-free bias, a shared expert, and capacities that drop tokens;
the metrics have loads and drops ("train/moe/…"). Literature: Shazeer et al. 2017, Fedus et al. 2022, DeepSeek-V3 2024. Obtained
(2026-11-26): between the two dense networks, as expected, but with four seeds nothing is settled; see LOG.md.
"""

from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.components import Capacity, Dense, MoE, Sigmoid

HALF = Dense(ratio=2.0)

ablation = Ablation(
    question="Does a mixture of experts beat a dense network at equal active parameters?",
    base=presets.nano(),
    scientific={
        "model.ffn": {
            "dense": Dense(),
            "dense-4x": Dense(ratio=16.0),
            "softmax": MoE(expert=HALF),
            "sigmoid": MoE(expert=HALF, router=Sigmoid(bias=True), balance=0.0),
            "shared": MoE(expert=HALF, active=1, shared=HALF),
            "capacity": MoE(expert=HALF, dispatch=Capacity(factor=1.25, over="row", priority="position")),
            "unbalanced": MoE(expert=HALF, balance=0.0),
        }
    },
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="dense",
    claims=[
        Claim("Experts beat a dense network of equal compute", better="softmax", than="dense"),
        Claim("A dense network of as many parameters beats experts", better="dense-4x", than="softmax"),
        Claim("Balancing by a bias beats balancing by a loss", better="sigmoid", than="softmax"),
        Claim("Balancing helps at all", better="softmax", than="unbalanced"),
        Claim("A shared expert helps", better="shared", than="softmax"),
    ],
    scales={"smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}}, "small": {}, "full": presets.FULL},
)
