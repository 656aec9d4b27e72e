"""The encoder-only Transformer (Devlin et al. 2019): the decoder's blocks, in which every token sees all others."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_jax.models.decoder import Decoder
from llm_jax.nn.attention import Bidirectional
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.multihead import Attention


@dataclass(frozen=True)
class Encoder(Decoder):
    """A `Decoder` without causality: for predicting masked tokens, for classes, for embeddings."""

    attention: Mixer = field(default_factory=lambda: Attention(mask=Bidirectional()))
