"""The laboratory: declare an ablation, run it, and read what it says."""

from llm_jax.lab.arms import Arms, chain, log_grid, product, zipped
from llm_jax.lab.experiment import Ablation, Claim, Experiment, Steadier

__all__ = ["Ablation", "Arms", "Claim", "Experiment", "Steadier", "chain", "log_grid", "product", "zipped"]
