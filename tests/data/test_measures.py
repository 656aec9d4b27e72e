"""Measures of tokenizers against counts by hand, and the table's promise: what is lost is seen."""

import math

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data import measures, ngram
from llm_jax.data.corpora import TextFiles
from llm_jax.data.measures import Text
from llm_jax.data.tokenizer_json import ByteLevelBPE, WordPiece
from llm_jax.data.tokenizers import Bytes

TRAIN, VALID = ("the cat sat", "a cat sat"), ("the  dog sat\n", "é sat")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("the cat sat. a dog (the cat) sat, the dog sat: " * 30)
    corpus = TextFiles(path=str(folder))
    return [kind.fit(corpus, folder) for kind in (ByteLevelBPE(270), WordPiece(30))]


def test_bytes_are_counted_by_hand():
    found = measures.measure(Bytes().fit(None, ""), Text(TRAIN, VALID))
    size = len("".join(VALID).encode())
    assert (found.vocabulary, found.bytes_per_token, found.unknown, found.lost, found.exact) == (257, 1.0, 0.0, 0.0, True)
    assert found.tokens_per_word == size / 5 and found.unseen_tokens == (len(b"dog") + len("é".encode())) / 2
    ids = [np.array([*"".join(f"{text}\0" for text in texts).encode()]) for texts in (TRAIN, VALID)]
    ids = [np.where(of == 0, 257, of) for of in ids]
    assert found.bits_per_byte == pytest.approx(-ngram.fit(ids[0], 258).log2(ids[1]).sum() / size)
    assert found.tokens_per_second > 0 and found.megabytes_per_second > 0


def test_what_is_lost_is_seen(fitted):
    lossless, lossy = (measures.measure(tokenizer, Text(TRAIN, VALID)) for tokenizer in fitted)
    assert lossless.exact and lossless.lost == lossless.unknown == 0
    assert not lossy.exact and lossy.lost == lossy.unknown == 1 / 5  # the é of five words
    spaced = measures.measure(fitted[1], Text(TRAIN, ("the (dog) sat.",)))
    assert spaced.unknown == 0 and spaced.lost == 2 / 3  # "( dog )" and "sat ." come back
    assert math.isnan(measures.measure(fitted[0], Text(TRAIN, ("cat sat",))).unseen_tokens)


def test_the_text_is_what_comes_first(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = TextFiles(path=str(tmp_path), valid_fraction=0.5)
    assert measures.text_of(corpus, 30e-6) == Text(("012345678901234567890123456789",), ("012345678901234",))
    with pytest.raises(ConfigError, match="has no text in its train or its validation split"):
        measures.text_of(TextFiles(path=str(tmp_path), valid_fraction=0.0), 1.0)
