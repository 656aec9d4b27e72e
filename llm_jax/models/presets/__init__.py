"""Published models as configurations: `model=presets.gpt2("355M")` in an experiment file, and `override` to scale one down.

    override(presets.llama3("8B"), {"width": 256, "depth": 4, "attention.heads": 8, "attention.kv_heads": 2, "ffn.units": 688})

A preset is an architecture; dropout is part of it only where a paper's results depend on it (`transformer_2017`, `lstm`).
`PRESETS` has each with its vocabulary and its published size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llm_jax.models.model import Model
from llm_jax.models.presets.classic import bert, bloom, flan_t5, gpt2, lstm, pythia, t5, t5_v1_1, transformer_2017
from llm_jax.models.presets.modern import (
    deepseek_v3,
    gemma2,
    gemma3,
    llama2,
    llama3,
    llama3_1,
    llama3_2,
    mistral,
    mixtral,
    qwen2,
    qwen3,
)

__all__ = [
    "PRESETS", "Preset", "bert", "bloom", "deepseek_v3", "flan_t5", "gemma2", "gemma3", "gpt2", "llama2", "llama3", "llama3_1",
    "llama3_2", "lstm", "mistral", "mixtral", "pythia", "qwen2", "qwen3", "t5", "t5_v1_1", "transformer_2017",
]  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A published model. vocabulary: rows of its table; parameters: trainable scalars, in all; source: where they are published.

    active: of these the ones that a token meets.
    """

    model: Callable[[], Model]
    vocabulary: int
    parameters: int
    source: str
    active: int | None = None


HUB = "huggingface.co/"
PRESETS: dict[str, Preset] = {
    # the paper prints 65 and 213 million for a table of "about 37000" rows; PTB's are 10,000
    "transformer-base": Preset(transformer_2017, 37_000, 63_045_632, "arxiv.org/abs/1706.03762, table 3"),
    "transformer-big": Preset(partial(transformer_2017, "big"), 37_000, 214_171_648, "arxiv.org/abs/1706.03762, table 3"),
    "lstm-medium": Preset(lstm, 10_000, 19_775_200, "arxiv.org/abs/1409.2329, section 4.1"),
    "lstm-large": Preset(partial(lstm, 1500, rate=0.65), 10_000, 66_022_000, "arxiv.org/abs/1409.2329, section 4.1"),
    "gpt2-124M": Preset(gpt2, 50_257, 124_439_808, HUB + "openai-community/gpt2"),
    "gpt2-355M": Preset(partial(gpt2, "355M"), 50_257, 354_823_168, HUB + "openai-community/gpt2-medium"),
    "gpt2-774M": Preset(partial(gpt2, "774M"), 50_257, 774_030_080, HUB + "openai-community/gpt2-large"),
    "gpt2-1.5B": Preset(partial(gpt2, "1.5B"), 50_257, 1_557_611_200, HUB + "openai-community/gpt2-xl"),
    "bert-base": Preset(bert, 30_522, 109_514_298, HUB + "google-bert/bert-base-uncased"),
    "bert-large": Preset(partial(bert, "large"), 30_522, 335_174_458, HUB + "google-bert/bert-large-uncased"),
    "t5-small": Preset(t5, 32_128, 60_506_624, HUB + "google-t5/t5-small"),
    "t5-base": Preset(partial(t5, "base"), 32_128, 222_903_552, HUB + "google-t5/t5-base"),
    "t5-large": Preset(partial(t5, "large"), 32_128, 737_668_096, HUB + "google-t5/t5-large"),
    "t5-3B": Preset(partial(t5, "3B"), 32_128, 2_851_598_336, HUB + "google-t5/t5-3b"),
    "t5-11B": Preset(partial(t5, "11B"), 32_128, 11_307_321_344, HUB + "google-t5/t5-11b"),
    "t5-v1.1-base": Preset(t5_v1_1, 32_128, 247_577_856, HUB + "google/t5-v1_1-base"),
    "flan-t5-small": Preset(partial(flan_t5, "small"), 32_128, 76_961_152, HUB + "google/flan-t5-small"),
    "flan-t5-base": Preset(flan_t5, 32_128, 247_577_856, HUB + "google/flan-t5-base"),
    "flan-t5-large": Preset(partial(flan_t5, "large"), 32_128, 783_150_080, HUB + "google/flan-t5-large"),
    "flan-t5-xl": Preset(partial(flan_t5, "xl"), 32_128, 2_849_757_184, HUB + "google/flan-t5-xl"),
    "flan-t5-xxl": Preset(partial(flan_t5, "xxl"), 32_128, 11_135_332_352, HUB + "google/flan-t5-xxl"),
    "pythia-160M": Preset(pythia, 50_304, 162_322_944, HUB + "EleutherAI/pythia-160m"),
    "pythia-1B": Preset(partial(pythia, "1B"), 50_304, 1_011_781_632, HUB + "EleutherAI/pythia-1b"),
    "bloom-560M": Preset(bloom, 250_880, 559_214_592, HUB + "bigscience/bloom-560m"),
    "llama2-7B": Preset(llama2, 32_000, 6_738_415_616, HUB + "meta-llama/Llama-2-7b-hf"),
    "llama2-13B": Preset(partial(llama2, "13B"), 32_000, 13_015_864_320, HUB + "meta-llama/Llama-2-13b-hf"),
    "llama2-70B": Preset(partial(llama2, "70B"), 32_000, 68_976_648_192, HUB + "meta-llama/Llama-2-70b-hf"),
    "llama3-8B": Preset(llama3, 128_256, 8_030_261_248, HUB + "meta-llama/Meta-Llama-3-8B"),
    "llama3-70B": Preset(partial(llama3, "70B"), 128_256, 70_553_706_496, HUB + "meta-llama/Meta-Llama-3-70B"),
    "llama3.1-8B": Preset(llama3_1, 128_256, 8_030_261_248, HUB + "meta-llama/Llama-3.1-8B"),
    "llama3.1-70B": Preset(partial(llama3_1, "70B"), 128_256, 70_553_706_496, HUB + "meta-llama/Llama-3.1-70B"),
    "llama3.2-1B": Preset(llama3_2, 128_256, 1_235_814_400, HUB + "meta-llama/Llama-3.2-1B"),
    "mistral-7B": Preset(mistral, 32_000, 7_241_732_096, HUB + "mistralai/Mistral-7B-v0.1"),
    "mixtral-8x7B": Preset(mixtral, 32_000, 46_702_792_704, HUB + "mistralai/Mixtral-8x7B-v0.1", 12_879_925_248),
    "qwen2-0.5B": Preset(qwen2, 151_936, 494_032_768, HUB + "Qwen/Qwen2.5-0.5B"),
    "qwen2-1.5B": Preset(partial(qwen2, "1.5B"), 151_936, 1_543_714_304, HUB + "Qwen/Qwen2.5-1.5B"),
    "qwen2-7B": Preset(partial(qwen2, "7B"), 152_064, 7_615_616_512, HUB + "Qwen/Qwen2.5-7B"),
    "qwen3-0.6B": Preset(qwen3, 151_936, 596_049_920, HUB + "Qwen/Qwen3-0.6B"),
    "qwen3-8B": Preset(partial(qwen3, "8B"), 151_936, 8_190_735_360, HUB + "Qwen/Qwen3-8B"),
    "qwen3-30B-A3B": Preset(partial(qwen3, "30B-A3B"), 151_936, 30_532_122_624, HUB + "Qwen/Qwen3-30B-A3B", 3_353_032_704),
    "deepseek-v3": Preset(deepseek_v3, 129_280, 671_026_419_200, HUB + "deepseek-ai/DeepSeek-V3", 37_552_297_472),
    "gemma2-2B": Preset(gemma2, 256_000, 2_614_341_888, HUB + "google/gemma-2-2b"),
    "gemma2-9B": Preset(partial(gemma2, "9B"), 256_000, 9_241_705_984, HUB + "google/gemma-2-9b"),
    "gemma3-270M": Preset(partial(gemma3, "270M"), 262_144, 268_098_176, HUB + "google/gemma-3-270m"),
    "gemma3-1B": Preset(gemma3, 262_144, 999_885_952, HUB + "google/gemma-3-1b-pt"),
    "gemma3-4B": Preset(partial(gemma3, "4B"), 262_208, 3_880_263_168, HUB + "google/gemma-3-4b-pt (text)"),
    "gemma3-12B": Preset(partial(gemma3, "12B"), 262_208, 11_766_034_176, HUB + "google/gemma-3-12b-pt (text)"),
    "gemma3-27B": Preset(partial(gemma3, "27B"), 262_208, 27_009_346_304, HUB + "google/gemma-3-27b-pt (text)"),
}
