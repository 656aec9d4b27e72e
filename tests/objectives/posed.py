"""What the tests of objectives share: rows of documents, posed, and their texts put together again by plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import Bytes
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.train.check import compiled

DECODER, PAIR = Decoder(), EncoderDecoder()


def tokenizer(objective):
    return Bytes().fit(None, "").with_specials(objective.specials)


def packed(sizes, *, rows=1, seed=0) -> Batch:
    """Rows of documents of so many random bytes, one after another."""
    ids = np.random.default_rng(seed).integers(0, 256, (rows, sum(sizes) + 1)).astype(np.int32)
    number = np.repeat(np.arange(len(sizes)), sizes)
    segments = np.broadcast_to(number, (rows, len(number))).astype(np.int32)
    weights = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))).astype(np.float32)
    positions = np.broadcast_to(np.concatenate([np.arange(size) for size in sizes]), segments.shape).astype(np.int32)
    return Batch(*(jnp.asarray(x) for x in (ids[:, :-1], ids[:, 1:], weights, segments, positions)))


def whole(length, *, rows=1, seed=0) -> Batch:
    """Rows of one document each."""
    ids = np.random.default_rng(seed).integers(0, 256, (rows, length + 1)).astype(np.int32)
    return Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))


def pose(objective, batch, *, model=DECODER, seed=0) -> Batch:
    """As NumPy arrays."""
    keys_B, tokens = jax.random.split(jax.random.key(seed), batch.tokens.shape[0]), tokenizer(objective)
    function = compiled(lambda batch, keys_B: objective.pose(batch, keys_B, model=model, tokens=tokens))
    return jax.tree.map(np.asarray, function(batch, keys_B))


def sequence(posed, row, document) -> tuple[list[int], list[bool]]:
    """The tokens of one document of what a decoder reads, and which of them are asked for."""
    places = np.arange(posed.tokens.shape[1]) if posed.segments is None else np.flatnonzero(posed.segments[row] == document)
    if not len(places):
        return [], []
    ids = posed.tokens[row, places].tolist()
    asked = [False, *(posed.weights[row, places] > 0).tolist()]
    if asked[-1]:
        ids.append(int(posed.targets[row, places[-1]]))
    assert [int(posed.targets[row, place]) for place, right in zip(places, asked[1:], strict=True) if right] == [
        token for token, right in zip(ids, asked, strict=False) if right
    ]
    return ids, asked[: len(ids)]


def read(posed, row, document) -> list[int]:
    """The tokens of one document of what an encoder reads."""
    if posed.input_segments is None:
        return posed.inputs[row].tolist()
    return posed.inputs[row, posed.input_segments[row] == document].tolist()


def chi_squared(counts, expected) -> float:
    """The probability of counts as far from what is expected, or farther."""
    from scipy.stats import chisquare

    return float(chisquare(counts, expected).pvalue)
