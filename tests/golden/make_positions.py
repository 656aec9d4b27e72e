"""What transformers' code says about positions, as small JSON files: `python -m tests.golden.make_positions` (extra `parity`).

The tests hold llm_jax against these files; a slow test makes them again and compares, so that they stay what transformers does.
"""

import json
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "positions"

# name → the rope_parameters of a configuration, with its head size, the length trained on, and that of the sequence at hand
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "linear, a quarter": {"rope_type": "linear", "factor": 8.0, "partial_rotary_factor": 0.25},
    "dynamic, short": {"rope_type": "dynamic", "factor": 2.0, "length": 1000},
    "dynamic, long": {"rope_type": "dynamic", "factor": 2.0, "length": 9000},
    "dynamic, long, half": {"rope_type": "dynamic", "factor": 4.0, "length": 3000, "partial_rotary_factor": 0.5},
    "ntk": {"rope_type": "dynamic", "factor": 2.0, "length": 3072},  # 2 · 3072 / 2048 - 1 = 2
    "yarn": YARN,
    "yarn, half": YARN | {"partial_rotary_factor": 0.5},
    "yarn, gpt-oss": YARN | {"factor": 32.0, "rope_theta": 150_000.0, "truncate": False},
    "yarn, DeepSeek-V2": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.1},
    "yarn, given amplitude": YARN | {"attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, no ramp": YARN | {"original_max_position_embeddings": 6},
    "llama3.1": LLAMA3 | {"factor": 8.0, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
    "llama3, half": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 256, "partial_rotary_factor": 0.5},
}
HEAD, TRAINED = 64, 2048
BUCKETS = [(32, 128, False), (32, 128, True), (8, 20, False), (8, 20, True), (10, 50, True)]
DISTANCES = [*range(-140, 141), -10_000, -1000, -200, 200, 1000, 10_000]


def scalings() -> dict[str, Any]:
    """Inverse frequencies and amplitude of every case, and DeepSeek's factor of the scores."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    found = {}
    for name, case in SCALINGS.items():
        rope = {"rope_theta": 10_000.0} | {k: v for k, v in case.items() if k != "length"}
        config = LlamaConfig(hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=TRAINED, rope_parameters=rope)
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=case.get("length"))
        score_factor = yarn_apply_mscale(rope, 1.0)
        found[name] = {"frequencies": frequencies.tolist(), "amplitude": amplitude, "score_factor": score_factor}
    return found


def buckets() -> dict[str, Any]:
    """T5's bucket of each distance (query - key)."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    return {
        f"{count} {most} {both}": T5Attention._relative_position_bucket(-torch.tensor(DISTANCES), both, count, most).tolist()
        for count, most, both in BUCKETS
    }


def alibi() -> dict[str, Any]:
    """BLOOM's biases of 12 keys, `[H, 12]`, each row up to a constant."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    return {str(heads): build_alibi_tensor(torch.ones(1, 12), heads, torch.float32)[:, 0].tolist() for heads in (1, 2, 6, 8, 12)}


def waves(*shape: int) -> np.ndarray:
    """Numbers that look random and need no file."""
    return np.sin(1.7 * np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def neox() -> dict[str, Any]:
    """GPT-NeoX's queries `waves(2, 3, 2, 16)`, a quarter of which is turned, at given places."""
    import torch
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    places = [[0, 1, 700], [5, 2, 3]]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    rotary = GPTNeoXRotaryEmbedding(GPTNeoXConfig(hidden_size=32, num_attention_heads=2, rope_parameters=rope))
    q_BHLK = torch.tensor(waves(2, 3, 2, 16)).transpose(1, 2)
    turned_BHLK, _ = apply_rotary_pos_emb(q_BHLK, q_BHLK, *rotary(q_BHLK, torch.tensor(places)))
    return {"places": places, "turned": turned_BHLK.transpose(1, 2).tolist()}


def sinusoids() -> dict[str, Any]:
    """Whisper's table of 20 places and 10 channels."""
    from transformers.models.whisper.modeling_whisper import sinusoids

    return {"table": sinusoids(20, 10).tolist()}


MAKERS = {maker.__name__: maker for maker in (scalings, buckets, alibi, neox, sinusoids)}


def stored(name: str) -> dict[str, Any]:
    """A golden file's content."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def _short(value: Any) -> Any:
    """float32 numbers with the nine digits that tell them apart."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    """Writes every file."""
    for name, maker in MAKERS.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(_short(maker()), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
