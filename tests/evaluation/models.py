"""Small models with random weights that read bytes."""

import dataclasses

import jax
import numpy as np

from llm_jax import LM
from llm_jax.core.sharding import unbox
from llm_jax.data.corpora import StandardLibrary
from llm_jax.data.tokenizers import Bytes
from llm_jax.models.decoder import Decoder
from llm_jax.models.model import abstract_parameters
from llm_jax.nn.ffn import Dense
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Learned, Rope

PLAIN = Decoder(width=16, depth=1, attention=Attention(heads=2), position=Rope())
LEARNED = dataclasses.replace(PLAIN, position=Learned(max_length=16), ffn=Dense(bias=True))


def speller(config=PLAIN, seed=0, **more) -> LM:
    """A model over bytes whose id 256 stands between documents."""
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32) * 0.5, unbox(abstract_parameters(config, 257)))
    fields = {"tokenizer": Bytes().fit(StandardLibrary(), "."), "end": (256,), "start": 256} | more
    return LM(config, 257, params, **fields)


def log_softmax(logits) -> np.ndarray:
    """In float64."""
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
