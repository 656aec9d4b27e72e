"""Makes tests/golden/moe/*.npz: mixtures of `transformers` with random weights, our names and layouts, and what they return.

pip install -e ".[parity]" && python tests/golden/make_moe.py
"""

import pathlib

import numpy as np
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

WIDTH, UNITS, EXPERTS = 8, 6, 8
FOLDER = pathlib.Path(__file__).parent / "moe"


def blocks() -> dict[str, torch.nn.Module]:
    """File name → block."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    qwen = heads | {"hidden_size": WIDTH, "moe_intermediate_size": UNITS, "num_experts": EXPERTS, "num_experts_per_tok": 3}
    deepseek = qwen | {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    del deepseek["num_experts"]
    return {
        "mixtral": MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=WIDTH, intermediate_size=UNITS, num_local_experts=EXPERTS, num_experts_per_tok=2, **heads)
        ),
        "qwen3_raw": Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**qwen, norm_topk_prob=False)),
        "qwen3_renormalized": Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**qwen, norm_topk_prob=True)),
        "deepseek_v2": DeepseekV2Moe(
            DeepseekV2Config(**deepseek, topk_method="group_limited_greedy", routed_scaling_factor=1.5, norm_topk_prob=False)
        ),
        "deepseek_v3": DeepseekV3MoE(DeepseekV3Config(**deepseek, routed_scaling_factor=2.5, norm_topk_prob=True)),
    }


def arrays(block: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters by our names, and what the block makes of random tokens."""
    x = torch.randn(2, 6, WIDTH)
    router = block.gate(x)[0].reshape(-1, EXPERTS)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    aux = load_balancing_loss_func((router,), EXPERTS, 2, mask)
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    found = {
        "router/kernel": block.gate.weight.T,
        "experts/gate/kernel": gate_up[:, :UNITS].transpose(1, 2),
        "experts/up/kernel": gate_up[:, UNITS:].transpose(1, 2),
        "experts/down/kernel": down.transpose(1, 2),
        "x": x,
        "y": block(x),
        "balance": aux,
        "valid": mask.bool(),
    }
    if hasattr(block.gate, "e_score_correction_bias"):
        found["router/bias"] = block.gate.e_score_correction_bias
    if hasattr(block, "shared_experts"):
        found |= {
            f"shared/{name}/kernel": getattr(block.shared_experts, f"{name}_proj").weight.T for name in ("gate", "up", "down")
        }
    return {name: value.detach().numpy() for name, value in found.items()}


def main() -> None:
    """Writes the files."""
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    for name, block in blocks().items():
        block.eval().requires_grad_(False)
        for parameter in (*block.parameters(), *block.buffers()):
            parameter.normal_(std=0.5)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays(block))


if __name__ == "__main__":
    main()
