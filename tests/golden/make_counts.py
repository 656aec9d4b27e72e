"""Parameters of published models, counted in `transformers`' and PyTorch's own modules on the meta device: no weights are made.

    pip install -e ".[parity]" && python -m tests.golden.make_counts

Writes tests/golden/counts.json: preset → parameters, those that a token meets where there are experts, and config.json's keys.
The configurations are those of the published models; what is absent is at transformers' default, as it is in their files.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).with_name("counts.json")


def gpt2(width: int, depth: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "GPT2LMHeadModel", {"vocab_size": 50257, "n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": 1024}


def llama(width: int, depth: int, heads: int, units: int, **more: Any) -> tuple[str, dict[str, Any]]:
    usual = {
        "vocab_size": 128256,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": units,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    return "LlamaForCausalLM", usual | more


def llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0} | scaling}


def mistral(vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
    }


def qwen3(width: int, depth: int, heads: int, groups: int, units: int, **more: Any) -> dict[str, Any]:
    usual = {
        "vocab_size": 151936,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "intermediate_size": units,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    }
    return usual | more


def gemma(width: int, depth: int, heads: int, groups: int, units: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    usual = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": units,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    }
    return usual | more


def neox(width: int, depth: int, heads: int) -> tuple[str, dict[str, Any]]:
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return "GPTNeoXForCausalLM", shape | {"vocab_size": 50304, "use_parallel_residual": True, "rope_parameters": rope}


def t5(width: int, units: int, depth: int, heads: int, size: int, **more: Any) -> tuple[str, dict[str, Any]]:
    shape = {"d_model": width, "d_ff": units, "num_layers": depth, "num_heads": heads, "d_kv": size, "vocab_size": 32128}
    return "T5ForConditionalGeneration", shape | more


def bert(width: int, depth: int, heads: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return shape | {"vocab_size": 30522}


DEEPSEEK = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def llama2(width: int, depth: int, heads: int, groups: int, units: int) -> tuple[str, dict[str, Any]]:
    return llama(width, depth, heads, units, vocab_size=32000, num_key_value_heads=groups, **plain_rope(10000.0))


def qwen2(width: int, depth: int, heads: int, groups: int, units: int, **more: Any) -> tuple[str, dict[str, Any]]:
    values = qwen3(width, depth, heads, groups, units, **more)
    return "Qwen2ForCausalLM", {name: value for name, value in values.items() if name != "head_dim"}


def flan_t5(width: int, units: int, depth: int, heads: int) -> tuple[str, dict[str, Any]]:
    return t5(width, units, depth, heads, 64, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def large_gemma3(*sizes: int, **more: Any) -> tuple[str, dict[str, Any]]:
    full = GEMMA3_ROPE["full_attention"] | {"rope_type": "linear", "factor": 8.0}
    ropes = GEMMA3_ROPE | {"full_attention": full}
    return "Gemma3ForCausalLM", gemma(*sizes, 262208, sliding_window=1024, rope_parameters=ropes, **more)  # type: ignore[misc]


GEMMA3_ROPE: dict[str, dict[str, Any]] = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-124M": gpt2(768, 12, 12),
    "gpt2-355M": gpt2(1024, 24, 16),
    "gpt2-774M": gpt2(1280, 36, 20),
    "gpt2-1.5B": gpt2(1600, 48, 25),
    "llama2-7B": llama2(4096, 32, 32, 32, 11008),
    "llama2-13B": llama2(5120, 40, 40, 40, 13824),
    "llama2-70B": llama2(8192, 80, 64, 8, 28672),
    "llama3.2-1B": llama(2048, 16, 32, 8192, tie_word_embeddings=True, **llama3_rope(32.0)),
    "llama3-8B": llama(4096, 32, 32, 14336),
    "llama3-70B": llama(8192, 80, 64, 28672),
    "llama3.1-8B": llama(4096, 32, 32, 14336, **llama3_rope(8.0)),
    "llama3.1-70B": llama(8192, 80, 64, 28672, **llama3_rope(8.0)),
    "mistral-7B": (
        "MistralForCausalLM",
        mistral() | {"sliding_window": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mixtral-8x7B": ("MixtralForCausalLM", mistral() | MIXTRAL),
    "qwen2-0.5B": qwen2(896, 24, 14, 2, 4864, tie_word_embeddings=True),
    "qwen2-1.5B": qwen2(1536, 28, 12, 2, 8960, tie_word_embeddings=True),
    "qwen2-7B": qwen2(3584, 28, 28, 4, 18944, vocab_size=152064),
    "qwen3-0.6B": ("Qwen3ForCausalLM", qwen3(1024, 28, 16, 8, 3072, tie_word_embeddings=True)),
    "qwen3-8B": ("Qwen3ForCausalLM", qwen3(4096, 36, 32, 8, 12288)),
    "qwen3-30B-A3B": ("Qwen3MoeForCausalLM", qwen3(2048, 48, 32, 4, 6144, **EXPERTS)),
    "deepseek-v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gemma2-2B": ("Gemma2ForCausalLM", gemma(2304, 26, 8, 4, 9216, 256000, sliding_window=4096)),
    "gemma2-9B": ("Gemma2ForCausalLM", gemma(3584, 42, 16, 8, 14336, 256000, sliding_window=4096)),
    "gemma3-270M": (
        "Gemma3ForCausalLM",
        gemma(640, 18, 4, 1, 2048, 262144, sliding_window=512, rope_parameters=GEMMA3_ROPE),
    ),
    "gemma3-4B": large_gemma3(2560, 34, 8, 4, 10240),
    "gemma3-12B": large_gemma3(3840, 48, 16, 8, 15360),
    "gemma3-27B": large_gemma3(5376, 62, 32, 16, 21504, head_dim=128, query_pre_attn_scalar=168),
    "gemma3-1B": (
        "Gemma3ForCausalLM",
        gemma(1152, 26, 4, 1, 6912, 262144, sliding_window=512, rope_parameters=GEMMA3_ROPE),
    ),
    "pythia-160M": neox(768, 12, 12),
    "pythia-1B": neox(2048, 16, 8),
    "bloom-560M": ("BloomForCausalLM", {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    "t5-small": t5(512, 2048, 6, 8, 64),
    "t5-base": t5(768, 3072, 12, 12, 64),
    "t5-large": t5(1024, 4096, 24, 16, 64),
    "t5-3B": t5(1024, 16384, 24, 32, 128),
    "t5-11B": t5(1024, 65536, 24, 128, 128),
    "t5-v1.1-base": t5(768, 2048, 12, 12, 64, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "flan-t5-small": flan_t5(512, 1024, 8, 6),
    "flan-t5-base": flan_t5(768, 2048, 12, 12),
    "flan-t5-large": flan_t5(1024, 2816, 24, 16),
    "flan-t5-xl": flan_t5(2048, 5120, 24, 32),
    "flan-t5-xxl": flan_t5(4096, 10240, 24, 64),
    "bert-base": ("BertForMaskedLM", bert(768, 12, 12)),
    "bert-large": ("BertForMaskedLM", bert(1024, 24, 16)),
}


def counted(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """A model's entry."""
    import torch
    import transformers

    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**values))
    own = dict(model.named_parameters())  # a tied matrix once
    if values.get("feed_forward_proj") == "gated-gelu":  # transformers 5 ties every T5, but the files of 1.1 have an output matrix
        own["lm_head.weight"] = model.lm_head.weight
    # what the choice of experts is corrected by is kept with the weights, and trained by counting
    biases = {k: v for k, v in model.named_buffers() if k.endswith("e_score_correction_bias")}
    total = sum(p.numel() for p in own.values()) + sum(b.numel() for b in biases.values())
    entry = {"parameters": total, "config": values | {"model_type": model.config.model_type, "architectures": [name]}}
    experts = [p for k, p in own.items() if ".experts." in k]
    if experts:
        count = values.get("num_local_experts") or values.get("num_experts") or values["n_routed_experts"]
        used = values["num_experts_per_tok"]
        entry["active"] = total - sum(p.numel() for p in experts) * (count - used) // count
    return entry


def transformer_2017(width: int, units: int, heads: int) -> dict[str, Any]:
    """PyTorch's, without what the paper's code has not: biases of attention, and norms after the last layers."""
    import torch

    with torch.device("meta"):
        model = torch.nn.Transformer(width, heads, 6, 6, units)
        table = torch.nn.Embedding(37000, width)
    norms = [f"{stack}.norm.{name}" for stack in ("encoder", "decoder") for name in ("weight", "bias")]
    unused = ("in_proj_bias", "out_proj.bias", *norms)
    kept = [p for name, p in model.named_parameters() if not name.endswith(unused)]
    return {"parameters": sum(p.numel() for p in kept) + table.weight.numel()}


def lstm(width: int) -> dict[str, Any]:
    """PyTorch's, which has two biases that are only ever added."""
    import torch

    with torch.device("meta"):
        parts = [torch.nn.Embedding(10000, width), torch.nn.LSTM(width, width, 2), torch.nn.Linear(width, 10000)]
    kept = [p for part in parts for name, p in part.named_parameters() if not name.startswith("bias_hh")]
    return {"parameters": sum(p.numel() for p in kept)}


def main() -> None:
    """Counts every model."""
    found = {preset: counted(*model) for preset, model in MODELS.items()}
    found |= {"transformer-base": transformer_2017(512, 2048, 8), "transformer-big": transformer_2017(1024, 4096, 16)}
    found |= {"lstm-medium": lstm(650), "lstm-large": lstm(1500)}
    FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for preset, entry in found.items():
        print(f"{preset:<16} {entry['parameters']:>15,}  {entry.get('active', 0):>14,}")


if __name__ == "__main__":
    main()
