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
    """scores: by name. documents, tokens, words, bytes: how much text was scored; unscored: first tokens that nothing is before.

    A document that has no other token is not among those that were scored.
    """

    scores: dict[str, Estimate]
    documents: int
    tokens: int
    words: int
    bytes: int
    unscored: int


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
    tally = _Tally(tell)
    windows = tally.windows(reader, islice(_documents(reader, corpus, split), limit), context)
    for number, found in Scorer(reader.lm.config, reader.lm.vocabulary, reader.lm.params)(windows):
        tally.scored(number, found.log_p)
    totals = [round(total) for total in tally.sums.totals]
    if not totals[TOKENS]:
        raise ConfigError(f"has no text in its {split} split: name another with --split", "corpus")
    return Predicted(_scores(tally.sums), tally.sums.count, totals[TOKENS], totals[WORDS], totals[BYTES], tally.unscored)


def _scores(sums: Sums) -> dict[str, Estimate]:
    nll = {name: sums.ratio(NLL, under) for name, under in (("token", TOKENS), ("word", WORDS), ("byte", BYTES))}
    scores = {f"{name}_perplexity": one.transformed(_exp, _exp(one.value)) for name, one in nll.items()}
    return scores | {"bits_per_byte": nll["byte"].transformed(lambda x: x / math.log(2), 1 / math.log(2))}


def _exp(x: float) -> float:
    return math.inf if x >= 700 else math.exp(x)


def words_of(text: str) -> int:
    """Words as lm-evaluation-harness counts them: what runs of white space part, also an empty one at either end."""
    return len(re.split(r"\s+", text))


# ── documents, and their windows ─────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Document:
    """A document's ids, and how many words and UTF-8 bytes it has."""

    ids: list[int]
    words: int
    bytes: int


def _documents(reader: Reader, corpus: Corpus, split: str) -> Iterator[_Document]:
    """Every document of each corpus that the split has, of a mixture those of its sources. Raises `ConfigError`."""
    corpus.require_split(split)
    for member in corpus.members(split):
        yield from _documents_of(reader, member.corpus, member.split)


def _documents_of(reader: Reader, corpus: Corpus, split: str) -> Iterator[_Document]:
    """Of a text, or of tokens where they are written already. Raises `ConfigError` where these lose some of the text."""
    tokenizer = reader.lm.tokenizer
    assert tokenizer is not None
    store = corpus.store(tokenizer.fingerprint, split, str(cache_dir()))
    if store is None:
        for text in corpus.documents(split):
            yield _Document(reader.encode(text), words_of(text), len(text.encode("utf-8")))
        return
    if not tokenizer.lossless:
        told = "loses some of the text, so that its words and bytes cannot be counted from tokens: score the text itself"
        raise ConfigError(told, "tokenizer")
    for begin, stop in pairwise(chain(store.starts, [len(store)])):
        ids = np.asarray(store.ids[int(begin) : int(stop)]).tolist()
        ids = reader.owned(ids[:-1] if store.end is not None and ids[-1:] == [store.end] else ids)
        text = tokenizer.decode(ids)
        yield _Document(ids, words_of(text), len(text.encode("utf-8")))


@dataclass
class _Open:
    """A document some of whose windows are not scored yet. numbers: NLL … BYTES; whole: whether all of them are handed over."""

    numbers: list[float]
    left: int = 0
    whole: bool = False
    nll: list[float] = field(default_factory=list)


class _Tally:
    """Puts the scores of windows, which come in another order, together to those of documents."""

    def __init__(self, tell: Tell):
        self.sums, self.unscored, self._tell = Sums(4), 0, tell
        self._open: dict[int, _Open] = {}
        self._owners: dict[int, int] = {}  # window → document

    def windows(self, reader: Reader, documents: Iterator[_Document], context: int) -> Iterator[Request]:
        """The windows of all documents, numbered as they come."""
        window, skipped = 0, 0 if reader.prefix else 1
        for number, document in enumerate(documents):
            lost = reader.lm.tokenizer.byte_lengths[document.ids[:skipped]].sum() if skipped else 0  # type: ignore[union-attr]
            self.unscored += min(skipped, len(document.ids))
            scored = len(document.ids) - skipped
            if scored <= 0:
                continue
            self._open[number] = entry = _Open([0.0, scored, document.words, document.bytes - float(lost)])
            for request in reader.windows(document.ids, context):
                self._owners[window] = number
                window, entry.left = window + 1, entry.left + 1
                yield request
            entry.whole = True
            self._close(number)

    def scored(self, window: int, log_p: float) -> None:
        """One window's Σ log p."""
        number = self._owners.pop(window)
        self._open[number].nll.append(-log_p)
        self._open[number].left -= 1
        self._close(number)

    def _close(self, number: int) -> None:
        entry = self._open[number]
        if entry.left or not entry.whole:
            return
        entry.numbers[NLL] = math.fsum(entry.nll)  # exact, and so the same in any order
        self.sums.add(entry.numbers)
        del self._open[number]
        self._tell(self.sums.count, f"{self.sums.count:,} documents, {self.sums.totals[TOKENS]:,.0f} tokens")
