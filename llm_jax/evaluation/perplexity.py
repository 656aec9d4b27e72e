"""How well a model predicts a corpus: perplexities of tokens, words and bytes, and bits per byte, with their errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.platform import cache_dir
from llm_jax.data.corpora import Corpus
from llm_jax.evaluation.estimates import Estimate, Sums
from llm_jax.evaluation.reading import Reader
from llm_jax.infer.scoring import Request, Scorer

NLL, TOKENS, WORDS, BYTES = range(4)  # numbers of a document
Tell = Callable[[int, str], None]  # (documents so far, in words)


@dataclass(frozen=True)
class Predicted:
    """scores: by name. documents, tokens, words, bytes: how much text was scored; unscored: first tokens that nothing is before."""

    scores: dict[str, Estimate]
    documents: int
    tokens: int
    words: int
    bytes: int
    unscored: int


@dataclass
class _Document:
    numbers: list[float]
    left: int  # windows whose score is not there yet
    whole: bool = False  # whether all its windows have been handed over
    sums: list[float] = field(default_factory=list)


def perplexity(
    reader: Reader, corpus: Corpus, split: str, *, context: int = 1, limit: int | None = None, tell: Tell = lambda *_: None
) -> Predicted:
    """Of the documents of a split, each for itself, all its tokens by windows (`Reader.windows`); limit: the first so many.

    Nothing of the corpus is held but what fills a few programs. Raises `ConfigError` for one without text.
    """
    if reader.lm.config.encodes:
        raise ConfigError("reads an input besides, and a corpus gives none: its answers are scored by --task", reader.lm.source)
    if not 1 <= context <= reader.length:
        raise ConfigError(f"must be in 1 … {reader.length}, the tokens that are read, got {context}", "context")
    sums, open_documents, unscored = Sums(4), {}, 0
    owners: dict[int, int] = {}  # request → document
    texts = islice(_texts(reader, corpus, split), limit)

    def requests() -> Iterator[Request]:
        nonlocal unscored
        number = 0
        for document, (ids, words, size) in enumerate(texts):
            first = 0 if reader.prefix else 1
            unscored += first
            size -= _bytes(reader, ids[:first])
            open_documents[document] = entry = _Document([0.0, len(ids) - first, words, size], 0)
            for request in reader.windows(ids, context):
                owners[number], number, entry.left = document, number + 1, entry.left + 1
                yield request
            entry.whole = True
            close(document)

    def close(document: int) -> None:
        entry = open_documents[document]
        if entry.whole and not entry.left:
            entry.numbers[NLL] = math.fsum(entry.sums)  # exact, and so the same in any order
            sums.add(entry.numbers)
            del open_documents[document]
            tell(sums.count, f"{sums.count:,} documents, {sums.totals[TOKENS]:,.0f} tokens")

    for number, found in Scorer(reader.lm.config, reader.lm.vocabulary, reader.lm.params)(requests()):
        document = owners.pop(number)
        open_documents[document].sums.append(-found.log_p)
        open_documents[document].left -= 1
        close(document)
    return _predicted(sums, unscored, split)


def _predicted(sums: Sums, unscored: int, split: str) -> Predicted:
    totals = [round(total) for total in sums.totals]
    if not sums.count or not totals[TOKENS]:
        raise ConfigError(f"has no text in its {split} split: name another with --split", "corpus")
    nll = {name: sums.ratio(NLL, under) for name, under in (("token", TOKENS), ("word", WORDS), ("byte", BYTES))}
    scores = {f"{name}_perplexity": one.transformed(_exp, _exp(one.value)) for name, one in nll.items()}
    scores["bits_per_byte"] = nll["byte"].transformed(lambda x: x / math.log(2), 1 / math.log(2))
    return Predicted(scores, sums.count, totals[TOKENS], totals[WORDS], totals[BYTES], unscored)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def words_of(text: str) -> int:
    """Words as lm-evaluation-harness counts them: what runs of white space part, also an empty one at either end."""
    return len(re.split(r"\s+", text))


def _bytes(reader: Reader, ids: list[int]) -> int:
    assert reader.lm.tokenizer is not None
    return sum(len(reader.lm.tokenizer.piece_bytes[i]) for i in ids)


def _texts(reader: Reader, corpus: Corpus, split: str) -> Iterator[tuple[list[int], int, int]]:
    """(ids, words, UTF-8 bytes) of every document: of a text, or of tokens where they are written already."""
    tokenizer = reader.lm.tokenizer
    assert tokenizer is not None
    store = corpus.store(tokenizer.fingerprint, split, str(cache_dir()))
    if store is None:
        for text in corpus.documents(split):
            yield reader.encode(text), words_of(text), len(text.encode("utf-8"))
        return
    for begin, stop in pairwise(chain(store.starts, [len(store)])):
        ids = np.asarray(store.ids[int(begin) : int(stop)]).tolist()
        ids = ids[:-1] if store.end is not None and ids[-1:] == [store.end] else ids
        text = tokenizer.decode(ids)
        yield ids, words_of(text), len(text.encode("utf-8"))
