"""The index: each concept, its home, and the experiment that tests what is said of it; None: not built yet."""

import pathlib
import re

import pytest

from llm_jax.lab.experiment import load

ROOT = pathlib.Path(__file__).parent.parent
CONCEPTS: dict[int, tuple[str, str | None, str | None]] = {
    1: ("tokenization", "llm_jax/data/tokenizers.py", "c01_tokenization"),
    2: ("embeddings", "llm_jax/nn/embedding.py", "c02_embeddings"),
    3: ("self-attention", "llm_jax/nn/attention.py", "c03_attention"),
    4: ("Transformer", "llm_jax/models/stack.py", "c04_transformer"),
    5: ("activation functions", "llm_jax/nn/activations.py", "c05_activations"),
    6: ("positional encoding", "llm_jax/nn/position.py", "c06_positional_encoding"),
    7: ("multi-head attention", "llm_jax/nn/multihead.py", "c07_heads"),
    8: ("layer normalization", "llm_jax/nn/normalization.py", "c08_normalization"),
    9: ("feed-forward", "llm_jax/nn/ffn.py", "c09_feed_forward"),
    10: ("residual connections", "llm_jax/nn/residual.py", "c10_residual"),
    11: ("pretraining", "llm_jax/train/pretrain.py", "c11_pretraining"),
    12: ("self-supervised learning", "llm_jax/objectives/denoising.py", "c12_self_supervised"),
    13: ("next-token prediction", "llm_jax/objectives/next_token.py", "c13_next_token"),
    14: ("gradient descent and backpropagation", "llm_jax/optim/gradients.py", None),
    15: ("optimizers", "llm_jax/optim/optimizers.py", "c15_optimizers"),
    16: ("loss functions", "llm_jax/nn/losses.py", "c16_losses"),
    17: ("dropout", "llm_jax/nn/dropout.py", None),
    18: ("RLHF", None, None),
    19: ("PPO", None, None),
    20: ("mixture of experts", "llm_jax/nn/moe.py", "c20_experts"),
    21: ("long context", "llm_jax/nn/rope.py", None),
    22: ("fine-tuning and LoRA", None, None),
    23: ("pruning and quantization", None, None),
    24: ("KV caching", "llm_jax/nn/cache.py", None),
    25: ("memory-augmented Transformers", None, None),
}


def test_every_experiment_is_in_the_index():
    files = {file.stem for file in (ROOT / "experiments").glob("c*.py")}
    assert files == {experiment for _, _, experiment in CONCEPTS.values() if experiment}


@pytest.mark.parametrize("number", CONCEPTS)
def test_a_concept_has_its_home_and_its_experiment_claims_something(number):
    _, home, experiment = CONCEPTS[number]
    assert home is None or (ROOT / home).is_file()
    if experiment:
        declared = load(ROOT / "experiments" / f"{experiment}.py")
        assert experiment.startswith(f"c{number:02}_") and declared.claims and "smoke" in declared.scales
        for scale in (None, *declared.scales):  # what its work folder keeps
            assert set(declared.at_scale(scale).described(scale)["scientific"]) == set(declared.arms)
        command = f"python -m llm_jax run --experiment=experiments/{experiment}.py --workdir=runs/c{number:02}"
        assert re.search(re.escape(command) + r"\s", (ROOT / "experiments" / f"{experiment}.py").read_text())
