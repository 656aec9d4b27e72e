"""The Transformer of 2017, the LSTM before it, and the families up to 2023."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from llm_jax.core.config import override
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel
from llm_jax.models.presets.sizes import PLAIN, UNTIED, shape
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional
from llm_jax.nn.dropout import Dropout
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense, Gated, NoFeedForward
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, NoNorm, RMSNorm
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias
from llm_jax.nn.recurrent import LSTM
from llm_jax.nn.residual import NoResidual


def transformer_2017(size: Literal["base", "big"] = "base") -> EncoderDecoder:
    """The Transformer as it was first: sinusoidal positions, post-norm, ReLU, one table for all. Vaswani et al. 2017, table 3.

    How it was trained (ibid., §5) is configuration too: of a plain text the encoder reads a row's first part, the decoder goes on:

        Experiment(
            model=transformer_2017(),
            objective=Continuation(smoothing=0.1),
            optimizer=Adam(learning_rate=(512 * 4000) ** -0.5, b2=0.98, epsilon=1e-9),
            schedule=Rsqrt(warmup=4000),
            train=Train(steps=100_000, clip=None),
        )
    """
    width, units, heads, rate = shape({"base": (512, 2048, 8, 0.1), "big": (1024, 4096, 16, 0.3)}, size)
    stack = Stack(
        width=width,
        depth=6,
        attention=Attention(heads=heads),
        ffn=Dense(units=units, activation="relu", bias=True),
        position=Sinusoidal(),
        norm=LayerNorm(),
        placement="post",
        dropout=Dropout(embedding=rate, residual=rate),
    )
    return EncoderDecoder(encoder=replace(stack, attention=Attention(heads=heads, mask=Bidirectional())), decoder=stack)


def lstm(width: int = 650, depth: int = 2, *, rate: float = 0.5) -> Decoder:
    """Stacked LSTMs without residuals or norms: Zaremba et al. 2014, §4.1, whose large one is `lstm(1500, rate=0.65)`."""
    return Decoder(
        width=width,
        depth=depth,
        attention=LSTM(),
        ffn=NoFeedForward(),
        position=NoPosition(),
        norm=NoNorm(),
        residual=NoResidual(),
        dropout=Dropout(embedding=rate, residual=rate),
        head=LanguageModel(tied=False, bias=True),
    )


def gpt2(size: Literal["124M", "355M", "774M", "1.5B"] = "124M") -> Decoder:
    """Radford et al. 2019."""
    sizes = {"124M": (768, 12, 12), "355M": (1024, 24, 16), "774M": (1280, 36, 20), "1.5B": (1600, 48, 25)}
    width, depth, heads = shape(sizes, size)
    return Decoder(
        width=width,
        depth=depth,
        attention=Attention(heads=heads, bias=True),
        ffn=Dense(units=4 * width, activation="gelu_tanh", bias=True),
        position=Learned(max_length=1024),
        embedding=PLAIN,
    )


def bert(size: Literal["base", "large"] = "base") -> Encoder:
    """With its head for masked words. Devlin et al. 2019."""
    width, depth, heads = shape({"base": (768, 12, 12), "large": (1024, 24, 16)}, size)
    return Encoder(
        width=width,
        depth=depth,
        attention=Attention(heads=heads, mask=Bidirectional(), bias=True),
        ffn=Dense(units=4 * width, bias=True),
        position=Learned(max_length=512),
        norm=LayerNorm(epsilon=1e-12),
        placement="post",
        embedding=Embed(scaled=False, norm=LayerNorm(epsilon=1e-12), types=2),
        head=LanguageModel(bias=True, transform="gelu"),
    )


T5Size = Literal["small", "base", "large", "3B", "11B"]
T5_SIZES = {  # width, hidden units, layers of each stack, heads, channels of a head
    "small": (512, 2048, 6, 8, 64),
    "base": (768, 3072, 12, 12, 64),
    "large": (1024, 4096, 24, 16, 64),
    "3B": (1024, 16_384, 24, 32, 128),
    "11B": (1024, 65_536, 24, 128, 128),
}


def t5(size: T5Size = "small") -> EncoderDecoder:
    """Raffel et al. 2020: scores without a scale, a learned bias by distance, no other biases."""
    width, units, depth, heads, head_dim = shape(T5_SIZES, size)
    attention = Attention(heads=heads, head_dim=head_dim, scale=1.0)
    ffn = Dense(units=units, activation="relu")
    decoder = Stack(width=width, depth=depth, attention=attention, ffn=ffn, position=T5Bias(), norm=RMSNorm())
    encoder = replace(decoder, attention=replace(attention, mask=Bidirectional()), position=T5Bias(bidirectional=True))
    return EncoderDecoder(encoder=encoder, decoder=decoder, embedding=PLAIN, head=LanguageModel(multiplier=width**-0.5))


T5V11Size = Literal["small", "base", "large", "xl", "xxl"]
T5V11_SIZES = {  # width, hidden units, layers of each stack, heads
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10_240, 24, 64),
}


def t5_v1_1(size: T5V11Size = "base") -> EncoderDecoder:
    """Version 1.1, whose layers gate (Shazeer 2020), with an output matrix of its own."""
    width, units, depth, heads = shape(T5V11_SIZES, size)
    ffn = Gated(units=units, activation="gelu_tanh")
    each = {"width": width, "depth": depth, "attention.heads": heads, "ffn": ffn}
    changes = {f"{stack}.{name}": value for stack in ("encoder", "decoder") for name, value in each.items()}
    return override(t5("small"), changes | {"head": UNTIED})


def flan_t5(size: T5V11Size = "base") -> EncoderDecoder:
    """The same, trained further on tasks that are told in words. Chung et al. 2022."""
    return t5_v1_1(size)


def pythia(size: Literal["160M", "1B"] = "160M") -> Decoder:
    """Biderman et al. 2023: GPT-NeoX's parallel layers, a quarter of each head turned."""
    width, depth, heads = shape({"160M": (768, 12, 12), "1B": (2048, 16, 8)}, size)
    return Decoder(
        width=width,
        depth=depth,
        attention=Attention(heads=heads, bias=True),
        ffn=Dense(units=4 * width, bias=True),
        position=Rope(fraction=0.25),
        placement="parallel",
        embedding=PLAIN,
        head=UNTIED,
    )


def bloom(size: Literal["560M"] = "560M") -> Decoder:
    """Le Scao et al. 2022: ALiBi, and a norm after the embedding."""
    width, depth, heads = shape({"560M": (1024, 24, 16)}, size)
    return Decoder(
        width=width,
        depth=depth,
        attention=Attention(heads=heads, bias=True),
        ffn=Dense(units=4 * width, activation="gelu_tanh", bias=True),
        position=Alibi(),
        embedding=Embed(scaled=False, norm=LayerNorm()),
    )
