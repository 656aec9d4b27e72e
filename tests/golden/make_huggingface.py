"""Tiny random models of every family as `transformers` writes them, and the logits that it computes.

    pip install -e ".[parity]" && python -m tests.golden.make_huggingface [case …]

Every case is a folder of `tests/golden/huggingface`: config.json and model.safetensors as saved, and expected.safetensors with the
inputs and the logits. The three rows of a batch are a full one, one padded on the right and one padded on the left.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

FOLDER = pathlib.Path(__file__).with_name("huggingface")
VOCABULARY, LENGTH, TARGETS = 23, 13, 6
REAL = ((0, LENGTH), (0, 7), (LENGTH - 5, LENGTH))  # where the tokens of each row stand; the rest is padding
FIRST = ((0, LENGTH), (0, 7), (0, 5))  # for models that look at the first token

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# so large that a model with another one shows
EPSILON = 0.02
ALIKE = SMALL | {"rms_norm_eps": EPSILON}
GROUPED = ALIKE | {"num_key_value_heads": 1}
LAYER_NORM = SMALL | {"layer_norm_eps": EPSILON}
DEEP = {"num_hidden_layers": 4}
LABELS = {"num_labels": 3}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "layer_norm_epsilon": EPSILON,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "layer_norm_epsilon": EPSILON}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
MIXTRAL = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = ALIKE | {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 3,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "layer_norm_epsilon": EPSILON,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
# case → (model class, configuration)
Case = tuple[str, dict[str, Any]]


def rope(kind: str, theta: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta} | more}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}

CASES: dict[str, Case] = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "n_inner": 10, "activation_function": "relu"}),
    "gpt2-by-depth": (
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
    ),
    "gpt2-unscaled": ("GPT2LMHeadModel", GPT2 | {"scale_attn_weights": False}),
    "gpt2-sequence": ("GPT2ForSequenceClassification", GPT2 | LABELS),
    "gpt2-token": ("GPT2ForTokenClassification", GPT2 | LABELS),
    "llama": ("LlamaForCausalLM", GROUPED | rope("default")),
    "llama-biases": (
        "LlamaForCausalLM",
        GROUPED
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "tie_word_embeddings": True}
        | {"num_attention_heads": 4, "num_key_value_heads": 2}
        | rope("default"),
    ),
    "llama-linear": ("LlamaForCausalLM", ALIKE | rope("linear", factor=4.0)),
    "llama-dynamic": ("LlamaForCausalLM", ALIKE | {"max_position_embeddings": 8} | rope("dynamic", factor=2.0)),
    "llama-llama3": ("LlamaForCausalLM", GROUPED | {"head_dim": 8} | rope("llama3", **LLAMA3)),
    "llama-yarn": ("LlamaForCausalLM", GROUPED | {"head_dim": 8} | rope("yarn", **YARN)),
    "llama-yarn-factor": (
        "LlamaForCausalLM",
        GROUPED | {"head_dim": 8} | rope("yarn", **YARN, attention_factor=1.3, truncate=False),
    ),
    "llama-sequence": ("LlamaForSequenceClassification", GROUPED | LABELS),
    "llama-token": ("LlamaForTokenClassification", GROUPED | LABELS),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 4, "head_dim": 6} | rope("default")),
    "mistral-full": ("MistralForCausalLM", GROUPED | {"sliding_window": None} | rope("default")),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | rope("default")),
    "qwen2-window": ("Qwen2ForCausalLM", GROUPED | DEEP | WINDOWED | {"max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 6} | rope("default")),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        GROUPED
        | DEEP
        | WINDOWED
        | {"head_dim": 4, "attention_bias": True, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        GROUPED
        | {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "Gemma2ForCausalLM",
        GROUPED
        | {"head_dim": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
        | {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 4},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        GROUPED
        | {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 24, "num_hidden_layers": 5}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]}
        | {"rope_parameters": GEMMA3_ROPE},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", LAYER_NORM | rope("default", partial_rotary_factor=0.5)),
    "gpt-neox-serial": (
        "GPTNeoXForCausalLM",
        LAYER_NORM
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}
        | rope("default", partial_rotary_factor=1.0),
    ),
    "bloom": ("BloomForCausalLM", BLOOM),
    "bloom-heads": ("BloomForCausalLM", BLOOM | {"hidden_size": 12, "n_head": 6, "tie_word_embeddings": False}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL | rope("default")),
    "mixtral-window": ("MixtralForCausalLM", MIXTRAL | {"sliding_window": 4, "head_dim": 6}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", GROUPED | EXPERTS | {"head_dim": 4, "norm_topk_prob": True}),
    "qwen3-moe-sparse": (
        "Qwen3MoeForCausalLM",
        GROUPED
        | EXPERTS
        | WINDOWED
        | {"head_dim": 6, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", DEEPSEEK | rope("default")),
    "deepseek-v3-yarn": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "attention_bias": True}
        | {"n_shared_experts": 2, "num_hidden_layers": 3, "routed_scaling_factor": 1.5}
        | rope("yarn", **YARN, mscale=0.8, mscale_all_dim=0.5),
    ),
    "deepseek-v3-mscale": ("DeepseekV3ForCausalLM", DEEPSEEK | rope("yarn", **YARN, mscale_all_dim=0.5)),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    ),
    "bert": ("BertForMaskedLM", LAYER_NORM),
    "bert-untied": ("BertForMaskedLM", LAYER_NORM | {"tie_word_embeddings": False}),
    "bert-sequence": ("BertForSequenceClassification", LAYER_NORM | LABELS | {"hidden_act": "gelu_new"}),
    "bert-token": ("BertForTokenClassification", LAYER_NORM | LABELS | {"type_vocab_size": 3}),
}

# further heads and scalings, of the architectures above
CASES |= {
    "gpt-neox-sequence": ("GPTNeoXForSequenceClassification", CASES["gpt-neox"][1] | LABELS),
    "gpt-neox-token": ("GPTNeoXForTokenClassification", CASES["gpt-neox"][1] | LABELS),
    "gpt-neox-yarn": ("GPTNeoXForCausalLM", LAYER_NORM | {"hidden_size": 16} | rope("yarn", **YARN, partial_rotary_factor=0.5)),
    "gpt-neox-dynamic": (
        "GPTNeoXForCausalLM",  # transformers divides by the channels that are turned, less 2
        LAYER_NORM | {"hidden_size": 16, "max_position_embeddings": 8} | rope("dynamic", factor=2.0, partial_rotary_factor=0.5),
    ),
    "bloom-sequence": ("BloomForSequenceClassification", BLOOM | LABELS),
    "bloom-token": ("BloomForTokenClassification", BLOOM | LABELS),
    "stablelm": (
        "StableLmForCausalLM",
        LAYER_NORM | {"num_key_value_heads": 1, "use_qkv_bias": True} | rope("default", partial_rotary_factor=0.5),
    ),
    "mistral-llama3": ("MistralForCausalLM", GROUPED | {"sliding_window": 4, "head_dim": 8} | rope("llama3", **LLAMA3)),
    "qwen2-yarn": ("Qwen2ForCausalLM", GROUPED | {"head_dim": 8} | rope("yarn", **YARN)),
    "qwen3-token": ("Qwen3ForTokenClassification", CASES["qwen3"][1] | LABELS),
    "gemma2-token": (
        "Gemma2ForTokenClassification",
        CASES["gemma2"][1] | LABELS | {"num_hidden_layers": 2} | rope("linear", factor=3.0),
    ),
    "gemma3-sequence": (
        "Gemma3TextForSequenceClassification",
        CASES["gemma3"][1] | LABELS | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral-sequence": (
        "MixtralForSequenceClassification",
        CASES["mixtral"][1] | LABELS | {"hidden_act": "relu", "num_hidden_layers": 1},
    ),
    "deepseek-v3-token": ("DeepseekV3ForTokenClassification", CASES["deepseek-v3"][1] | LABELS),
}
# made and compared where transformers is, and not kept
LIVE: dict[str, Case] = {
    "mistral-sequence": ("MistralForSequenceClassification", CASES["mistral"][1] | LABELS),
    "mistral-token": ("MistralForTokenClassification", CASES["mistral"][1] | LABELS),
    "qwen2-sequence": ("Qwen2ForSequenceClassification", CASES["qwen2"][1] | LABELS),
    "qwen2-token": ("Qwen2ForTokenClassification", CASES["qwen2"][1] | LABELS),
    "qwen3-sequence": ("Qwen3ForSequenceClassification", CASES["qwen3"][1] | LABELS),
    "gemma2-sequence": ("Gemma2ForSequenceClassification", CASES["gemma2"][1] | LABELS),
    "mixtral-token": ("MixtralForTokenClassification", CASES["mixtral"][1] | LABELS),
    "qwen3-moe-sequence": ("Qwen3MoeForSequenceClassification", CASES["qwen3-moe"][1] | LABELS),
    "qwen3-moe-token": ("Qwen3MoeForTokenClassification", CASES["qwen3-moe"][1] | LABELS),
    "deepseek-v3-sequence": ("DeepseekV3ForSequenceClassification", CASES["deepseek-v3"][1] | LABELS),
    "deepseek-v3-sparse": ("DeepseekV3ForCausalLM", CASES["deepseek-v3"][1] | {"first_k_dense_replace": 0}),
    "t5-silu": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu"}),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        LAYER_NORM
        | {"num_key_value_heads": 2, "use_parallel_residual": True, "hidden_act": "gelu", "tie_word_embeddings": True}
        | rope("default", partial_rotary_factor=1.0),
    ),
    "stablelm-sequence": (
        "StableLmForSequenceClassification",
        LAYER_NORM | LABELS | {"num_key_value_heads": 2} | rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "stablelm-token": (
        "StableLmForTokenClassification",
        LAYER_NORM | LABELS | {"num_key_value_heads": 1} | rope("default", partial_rotary_factor=0.5),
    ),
    "bert-relu": ("BertForMaskedLM", LAYER_NORM | {"hidden_act": "relu"}),
}
ALL = CASES | LIVE


def build(name: str, seed: int = 0):
    """The case's model with random weights, norms and biases included."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model_class, settings = ALL[name]
    cls = getattr(transformers, model_class)
    # the plain implementations: those for large models want sizes that are multiples of 4
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager", experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters()) | {k: b for k, b in model.named_buffers() if k.endswith("correction_bias")}
    with torch.no_grad():
        for key, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = weight.ndim == 1 and key.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_scale else (0.25 if weight.ndim == 1 else 0.4) * noise)
    if model_class.startswith("T5") and settings.get("tie_word_embeddings") is False:
        untie(model, generator)
    return model


def untie(model, generator) -> None:
    """T5 1.1 has an output layer of its own, although the present configuration class ties it in memory."""
    import torch

    model.lm_head.weight = torch.nn.Parameter(0.4 * torch.randn(model.lm_head.weight.shape, generator=generator))
    model.config.tie_word_embeddings = False


def inputs(name: str, seed: int = 0) -> dict[str, Any]:
    """int32 arrays: tokens `[3, L]` and mask, 1 for real ones; for T5 targets and their mask; for BERT token types."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = FIRST if ALL[name][0] == "BertForSequenceClassification" else REAL
    mask = np.array([[start <= place < stop for place in range(LENGTH)] for start, stop in rows], np.int32)
    found = {"tokens": rng.integers(3, VOCABULARY, mask.shape, dtype=np.int32) * mask, "mask": mask}
    if ALL[name][0].startswith("T5"):
        target_mask = (np.arange(TARGETS)[None] < np.array([[TARGETS], [4], [2]])).astype(np.int32)
        found |= {"targets": rng.integers(3, VOCABULARY, target_mask.shape, dtype=np.int32) * target_mask}
        found |= {"target_mask": target_mask}
    if ALL[name][0].startswith("Bert"):
        found["types"] = rng.integers(0, 2, mask.shape, dtype=np.int32)
    return found


def logits(model, given: dict[str, Any]):
    """What `transformers` computes from `inputs`, float32."""
    import torch

    tensors = {key: torch.tensor(value).long() for key, value in given.items()}
    more = {}
    if "targets" in tensors:
        more = {"decoder_input_ids": tensors["targets"], "decoder_attention_mask": tensors["target_mask"]}
    elif "Bloom" not in type(model).__name__:
        more = {"position_ids": (tensors["mask"].cumsum(-1) - 1).clip(0)}
    if "types" in tensors:
        more["token_type_ids"] = tensors["types"]
    with torch.no_grad():
        return model(input_ids=tensors["tokens"], attention_mask=tensors["mask"], **more).logits.float().numpy()


def main(names: list[str]) -> None:
    from safetensors.numpy import save_file

    for name in names or CASES:
        model, given = build(name), inputs(name)
        model.save_pretrained(FOLDER / name)
        for extra in FOLDER.glob(f"{name}/generation_config.json"):
            extra.unlink()
        save_file(given | {"logits": logits(model, given)}, FOLDER / name / "expected.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
