"""Llama and what grew out of it, with and without experts, and Gemma."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel, MultiToken
from llm_jax.models.presets.sizes import PLAIN, UNTIED, shape
from llm_jax.nn.attention import SlidingWindow
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Gated
from llm_jax.nn.latent import MLA
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.nn.position import Rope
from llm_jax.nn.rope import LinearScaling, Llama3Scaling, YarnScaling
from llm_jax.nn.routing import Sigmoid


def _llama(width: int, depth: int, heads: int, groups: int, units: int, theta: float, **more: Any) -> Decoder:
    """RMSNorm, gated networks, grouped queries, turned. more: further fields, of which attention's start with `attention_`."""
    attention = {k.removeprefix("attention_"): more.pop(k) for k in list(more) if k.startswith("attention_")}
    usual = {
        "attention": Attention(heads=heads, kv_heads=groups, **attention),
        "ffn": Gated(units=units),
        "position": Rope(theta=theta),
        "norm": RMSNorm(epsilon=1e-5),
        "embedding": PLAIN,
        "head": UNTIED,
    }
    return Decoder(width=width, depth=depth, **(usual | more))


def llama2(size: Literal["7B", "13B", "70B"] = "7B") -> Decoder:
    """Touvron et al. 2023: only the largest has grouped queries."""
    sizes = {"7B": (4096, 32, 32, 32, 11_008), "13B": (5120, 40, 40, 40, 13_824), "70B": (8192, 80, 64, 8, 28_672)}
    return _llama(*shape(sizes, size), 10_000.0)


LLAMA3_SIZES = {"8B": (4096, 32, 32, 8, 14_336), "70B": (8192, 80, 64, 8, 28_672)}


def llama3(size: Literal["8B", "70B"] = "8B") -> Decoder:
    """Grattafiori et al. 2024."""
    return _llama(*shape(LLAMA3_SIZES, size), 500_000.0)


def llama3_1(size: Literal["8B", "70B"] = "8B") -> Decoder:
    """The same for 128k tokens, with scaled positions."""
    return replace(llama3(size), position=Rope(theta=500_000.0, scaling=Llama3Scaling(factor=8.0)))


def llama3_2(size: Literal["1B"] = "1B") -> Decoder:
    """Meta 2024: small enough for telephones, and tied."""
    position = Rope(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))
    return _llama(*shape({"1B": (2048, 16, 32, 8, 8192)}, size), 500_000.0, position=position, head=LanguageModel())


def mistral() -> Decoder:
    """7B, version 0.1. Jiang et al. 2023."""
    return _llama(4096, 32, 32, 8, 14_336, 10_000.0, attention_mask=SlidingWindow(4096))


def mixtral() -> Decoder:
    """8 × 7B. Jiang et al. 2024."""
    moe = MoE(experts=8, active=2, expert=Gated(units=14_336), balance=0.02)
    return _llama(4096, 32, 32, 8, 14_336, 1_000_000.0, ffn=moe)


def qwen2(size: Literal["0.5B", "1.5B", "7B"] = "0.5B") -> Decoder:
    """Yang et al. 2024, and version 2.5, which is trained longer: queries, keys and values have biases; the small ones are tied."""
    sizes = {"0.5B": (896, 24, 14, 2, 4864), "1.5B": (1536, 28, 12, 2, 8960), "7B": (3584, 28, 28, 4, 18_944)}
    more = {} if size == "7B" else {"head": LanguageModel()}
    biases = {"attention_bias": True, "attention_output_bias": False}
    return _llama(*shape(sizes, size), 1_000_000.0, norm=RMSNorm(), **biases, **more)


def qwen3(size: Literal["0.6B", "8B", "30B-A3B"] = "0.6B") -> Decoder:
    """Yang et al. 2025: queries and keys are normalized; 30B-A3B has 128 experts, 8 active."""
    sizes = {"0.6B": (1024, 28, 16, 8, 3072), "8B": (4096, 36, 32, 8, 12_288), "30B-A3B": (2048, 48, 32, 4, 6144)}
    norm = RMSNorm()
    more: dict[str, Any] = {"norm": norm, "attention_qk_norm": norm, "attention_head_dim": 128}
    if size == "0.6B":
        more["head"] = LanguageModel()
    if size == "30B-A3B":
        more["ffn"] = MoE(experts=128, active=8, expert=Gated(units=768), balance=0.001)
    return _llama(*shape(sizes, size), 1_000_000.0, **more)


def deepseek_v3(*, ahead: int = 0) -> Decoder:
    """671B. DeepSeek-AI 2024: MLA, 3 dense layers, then 256 experts with loss-free balancing. ahead: further tokens predicted."""
    router = Sigmoid(bias=True, groups=8, active_groups=4, scale=2.5)
    expert = Gated(units=2048)
    # eq. 17-20 with α = 0.0001, whose loads are divided by the 8 choices
    moe = MoE(256, 8, expert=expert, shared=expert, router=router, balance=0.0001 / 8, balance_over="row")
    yarn = YarnScaling(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    return Decoder(
        width=7168,
        depth=61,
        attention=MLA(heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        ffn=moe,
        position=Rope(scaling=yarn),
        norm=RMSNorm(),
        first=(Layer(ffn=Gated(units=18_432)),) * 3,
        embedding=PLAIN,
        head=MultiToken(tied=False, ahead=ahead) if ahead else UNTIED,
    )


# ── Gemma ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _gemma(width: int, depth: int, heads: int, groups: int, units: int, *, cap: float | None, **more: Any) -> Decoder:
    """Norms on both sides of a branch, embeddings scaled and tied; `attention_…` fields are the attention's."""
    usual = {
        "ffn": Gated(units=units, activation="gelu_tanh"),
        "norm": RMSNorm(offset=True),
        "placement": "sandwich",
        "embedding": Embed(),
        "head": LanguageModel(soft_cap=cap),
        "attention_head_dim": 256,
        "attention_scale": 256**-0.5,
    }
    return _llama(width, depth, heads, groups, units, 10_000.0, **(usual | more))


def gemma2(size: Literal["2B", "9B"] = "2B") -> Decoder:
    """Gemma Team 2024: capped scores, every second layer sees all, the others 4,096 tokens."""
    sizes = {"2B": (2304, 26, 8, 4, 9216), "9B": (3584, 42, 16, 8, 14_336)}
    model = _gemma(*shape(sizes, size), cap=30.0, attention_soft_cap=50.0)
    local = Layer(attention=replace(model.attention, mask=SlidingWindow(4096)))  # type: ignore[type-var]
    return replace(model, pattern=(local, Layer()))


GEMMA3_SIZES = {
    "270M": (640, 18, 4, 1, 2048),
    "1B": (1152, 26, 4, 1, 6912),
    "4B": (2560, 34, 8, 4, 10_240),
    "12B": (3840, 48, 16, 8, 15_360),
    "27B": (5376, 62, 32, 16, 21_504),
}


def gemma3(size: Literal["270M", "1B", "4B", "12B", "27B"] = "1B") -> Decoder:
    """Gemma Team 2025, what reads text: normalized queries and keys, 5 layers that see a window for every one that sees all.

    The latter have a base of their own, and from 4B on their positions are scaled to 128k tokens.
    """
    small = size in ("270M", "1B")
    scaling = None if small else LinearScaling(factor=8.0)
    more: dict[str, Any] = {"position": Rope(theta=1_000_000.0, scaling=scaling), "attention_qk_norm": RMSNorm(offset=True)}
    if size == "27B":
        more |= {"attention_head_dim": 128, "attention_scale": 168**-0.5}
    model = _gemma(*shape(GEMMA3_SIZES, size), cap=None, **more)
    window = SlidingWindow(512 if small else 1024)
    local = Layer(attention=replace(model.attention, mask=window), position=Rope())  # type: ignore[type-var]
    return replace(model, pattern=(local,) * 5 + (Layer(),))
