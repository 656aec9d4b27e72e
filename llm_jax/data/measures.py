"""What tells tokenizers apart on the same text: how long its ids get, what they cost, what is lost, and how quick they are.

Fertility is what Rust et al. 2021 call so, ids a word; bits per byte are those of an n-gram model of the ids (`data.ngram`), which
is fitted in seconds and has no settings that would suit one tokenizer better than another. It looks four ids back, which is less
text for short ids: it compares tokenizers of about one vocabulary. To compare bytes with subwords, train models
(`experiments/c01_tokenization.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data import ngram
from llm_jax.data.corpora import Corpus
from llm_jax.data.tokenizers import Fitted

ROUNDS = 3  # of encoding, of which the quickest counts: the others were disturbed


@dataclass(frozen=True)
class Text:
    """What is measured on: documents to fit the n-gram model to, and others to measure."""

    train: tuple[str, ...]
    valid: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents that are measured."""
        return sum(len(text.encode("utf-8")) for text in self.valid)


@dataclass(frozen=True)
class Measures:
    """Of a tokenizer on a text; words are what spaces and line ends part.

    tokens_per_word: ids over words, spaces and all (fertility). unseen_tokens: ids of a word that is not in the train documents,
    standing alone; nan without such words. unknown: share of words that have an id for "unknown". lost: share of words that do not
    come back as they were. exact: whether every document does. bits_per_byte: of the n-gram model, over the text's own bytes and
    with the ends of documents; of what is left where something is lost. tokens_per_second, megabytes_per_second: of encoding.
    """

    vocabulary: int
    bytes_per_token: float
    tokens_per_word: float
    unseen_tokens: float
    unknown: float
    lost: float
    exact: bool
    bits_per_byte: float
    tokens_per_second: float
    megabytes_per_second: float


def text_of(corpus: Corpus, megabytes: float) -> Text:
    """The first so many megabytes of the train split, and half as many of the validation split. Raises `ConfigError`."""
    found = Text(_first(corpus.documents("train"), megabytes), _first(corpus.documents("valid"), megabytes / 2))
    if not found.train or not found.bytes:
        raise ConfigError("has no text in its train or its validation split: tokenizers are compared on both", "corpus")
    return found


def measure(tokenizer: Fitted, text: Text) -> Measures:
    """Everything of one tokenizer. Raises `ConfigError` for a character that it does not take."""
    rounds = [_timed(tokenizer, text.valid) for _ in range(ROUNDS)]
    ids, seconds = rounds[0][0], min(taken for _, taken in rounds)
    count, words = sum(map(len, ids)), Counter(word for document in text.valid for word in document.split())
    known = {word for document in text.train for word in document.split()}
    alone = dict(zip(words, tokenizer.encode_all(words), strict=True))
    unseen = [len(alone[word]) * times for word, times in words.items() if word not in known]
    times_unseen = sum(times for word, times in words.items() if word not in known)
    unknown = sum(times for word, times in words.items() if tokenizer.unknown in alone[word])
    lost = sum(times for word, times in words.items() if tokenizer.decode(alone[word]) != word)
    bytes_, total = text.bytes, max(words.total(), 1)
    return Measures(
        vocabulary=tokenizer.vocabulary,
        bytes_per_token=bytes_ / max(count, 1),
        tokens_per_word=count / total,
        unseen_tokens=sum(unseen) / times_unseen if times_unseen else float("nan"),
        unknown=unknown / total,
        lost=lost / total,
        exact=all(tokenizer.decode(found) == document for found, document in zip(ids, text.valid, strict=True)),
        bits_per_byte=_bits(tokenizer, text.train, ids) / bytes_,
        tokens_per_second=count / seconds,
        megabytes_per_second=bytes_ / seconds / 1e6,
    )


def _first(documents: Iterable[str], megabytes: float) -> tuple[str, ...]:
    found, room = [], int(megabytes * 1e6)
    for document in documents:
        if room <= 0:
            break
        found.append(document[:room])
        room -= len(document)
    return tuple(found)


def _bits(tokenizer: Fitted, train: Iterable[str], valid: list[np.ndarray]) -> float:
    """Of the validation documents' ids, each with an end."""
    end = tokenizer.vocabulary  # one id more, so that those without an end of their own have one too
    joined = [np.concatenate([part for ids in of for part in (ids, [end])]) for of in (tokenizer.encode_all(train), valid)]
    return float(-ngram.fit(joined[0], end + 1).log2(joined[1]).sum())


def _timed(tokenizer: Fitted, documents: Iterable[str]) -> tuple[list[np.ndarray], float]:
    """The ids of each document, and the seconds that they took in one thread."""
    start = time.perf_counter()
    return list(tokenizer.encode_all(documents)), time.perf_counter() - start
