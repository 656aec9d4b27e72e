"""Perplexity of a corpus: sums by hand over the logits of each window, of texts and of prepared tokens alike."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.corpora import Jsonl, Mixture, Prepared, Recall, Source, TextFiles
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer_json import HuggingFace, WordPiece
from llm_jax.data.tokenizers import Bytes, Characters
from llm_jax.evaluation.perplexity import perplexity
from llm_jax.evaluation.reading import Reader
from llm_jax.infer.scoring import require_finite
from llm_jax.io.tokenizer_json import save
from tests.evaluation.models import log_softmax, speller

TEXTS = ["the quick brown fox\n", "naïve — 日本 ", "a", "jumps over the lazy dog " * 3, " two  spaces "]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return Jsonl(path=str(file), valid_fraction=0.0, test_fraction=0.0)


def by_hand(lm, length):
    """-Σ ln p of each text: rows of `length` tokens, the last one reaching back."""
    found = []
    for text in TEXTS:
        row, nll, scored = [256, *text.encode()], 0.0, 0
        while scored < len(row) - 1:
            stop = min(scored + length, len(row) - 1)
            begin = max(stop - length, 0)
            log_p = log_softmax(lm.logits([row[begin:stop]])[0])
            nll -= sum(log_p[place - begin, row[place + 1]] for place in range(scored, stop))
            scored = stop
        found.append(nll)
    return found


@pytest.mark.parametrize("length", [8, 200])
def test_scores_are_sums_by_hand(corpus, length):
    lm = speller()
    found = perplexity(Reader(lm, length), corpus, "train")
    nll, sizes = by_hand(lm, length), [len(text.encode()) for text in TEXTS]
    words = [5, 4, 1, 16, 4]  # an empty one stands where a text begins or ends with white space
    assert (found.documents, found.tokens, found.bytes, found.words, found.unscored) == (5, sum(sizes), sum(sizes), sum(words), 0)
    scores = found.scores
    assert scores["token_perplexity"].value == pytest.approx(math.exp(sum(nll) / sum(sizes)), rel=1e-6)
    assert scores["byte_perplexity"].value == pytest.approx(scores["token_perplexity"].value)
    assert math.log(scores["word_perplexity"].value) == pytest.approx(sum(nll) / sum(words), rel=1e-6)
    bits = scores["bits_per_byte"]
    assert bits.value == pytest.approx(sum(nll) / sum(sizes) / math.log(2), rel=1e-6)
    apart = np.array(nll) / math.log(2) - bits.value * np.array(sizes)
    assert bits.error == pytest.approx(math.sqrt(5 / 4 * (apart**2).sum()) / sum(sizes), rel=1e-4)
    assert bits.low < bits.value < bits.high and bits.count == 5


def test_more_context_is_what_later_windows_see(corpus):
    lm = speller()
    one, all_ = (perplexity(Reader(lm, 8), corpus, "train", context=context) for context in (1, 8))
    whole = 0.0
    for text in TEXTS:
        row = [256, *text.encode()]
        for place in range(1, len(row)):
            begin = max(place - 8, 0)
            whole -= log_softmax(lm.logits([row[begin:place]])[0, : place - begin])[-1, row[place]]
    assert all_.scores["bits_per_byte"].value == pytest.approx(whole / all_.bytes / math.log(2), rel=1e-6)
    assert all_.scores["bits_per_byte"].value != pytest.approx(one.scores["bits_per_byte"].value, rel=1e-4)


def test_prepared_tokens_score_as_their_text_does(corpus, tmp_path):
    prepare(corpus, Bytes(), tmp_path / "tokens", cache=tmp_path, workers=1)
    lm = speller()
    text, tokens = (perplexity(Reader(lm, 8), of, "train") for of in (corpus, Prepared(path=str(tmp_path / "tokens"))))
    assert text == tokens
    (tmp_path / "a.txt").write_text("abc")
    other = Reader(speller(tokenizer=Characters().fit(TextFiles(path=str(tmp_path / "a.txt")), tmp_path)), 8)
    with pytest.raises(ConfigError, match="tokenizer is not the one that"):
        perplexity(other, Prepared(path=str(tmp_path / "tokens")), "train")


def test_a_mixture_is_its_sources_one_after_another(corpus, tmp_path):
    prepare(corpus, Bytes(), tmp_path / "tokens", cache=tmp_path, workers=1)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"and one more, {name} " * 9)
    of_tokens, more = Prepared(path=str(tmp_path / "tokens")), Source("b", TextFiles(path=str(tmp_path / "?.txt")))
    reader = Reader(speller(), 8)
    text, tokens = (perplexity(reader, Mixture((Source("a", of), more)), "train") for of in (corpus, of_tokens))
    parts = [perplexity(reader, of, "train") for of in (corpus, more.corpus)]
    assert text == tokens and text.bytes == sum(part.bytes for part in parts) and text.documents == len(TEXTS) + 2
    nll = [part.scores["bits_per_byte"].value * part.bytes for part in parts]
    assert text.scores["bits_per_byte"].value == pytest.approx(sum(nll) / text.bytes)
    both = Mixture((more, Source("r", Recall(length=20, rows=4, distances=(3,)))))
    assert perplexity(reader, both, "b") == perplexity(reader, more.corpus, "valid")
    assert perplexity(reader, both, "r.3-facts", limit=5) == perplexity(reader, both.sources[1].corpus, "3-facts", limit=5)


def test_tokens_that_lose_some_of_the_text_are_refused(corpus, tmp_path):
    save(WordPiece(vocabulary=89).fit(corpus, tmp_path), tmp_path / "files")
    pieces = HuggingFace(path=str(tmp_path / "files"))
    lossy = pieces.fit(corpus, tmp_path)
    assert not lossy.lossless
    prepare(corpus, pieces, tmp_path / "tokens", cache=tmp_path, workers=1)
    reader = Reader(speller(tokenizer=lossy), 8)
    assert perplexity(reader, corpus, "train").bytes == sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(ConfigError, match=r"tokenizer loses some of the text, so that .*: score the text itself"):
        perplexity(reader, Prepared(path=str(tmp_path / "tokens")), "train")


def test_a_model_that_has_diverged_has_no_score(corpus):
    lm = speller()
    lm = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf * np.nan, lm.params))
    with pytest.raises(ConfigError, match="the model gives a log p of nan, so that it has no score: its training diverged"):
        perplexity(Reader(lm, 8), corpus, "train")
    require_finite(np.array([-1e30, 0.0]))
    with pytest.raises(ConfigError, match="the model gives a log p of -inf"):
        require_finite(np.array([-1.0, -np.inf]))


def test_a_limit_takes_the_first_documents(corpus):
    told = []
    found = perplexity(Reader(speller(), 8), corpus, "train", limit=2, tell=lambda done, words: told.append((done, words)))
    assert (found.documents, found.bytes) == (2, sum(len(text.encode()) for text in TEXTS[:2]))
    assert told[-1] == (2, f"2 documents, {found.tokens} tokens")
    alone = perplexity(Reader(speller(), 8), corpus, "train", limit=1)
    assert all(math.isnan(score.low) and math.isnan(score.high) for score in alone.scores.values())  # and not infinite


def test_without_a_token_that_texts_begin_with_the_first_is_not_scored(corpus):
    lm = speller(start=None, end=())
    found = perplexity(Reader(lm, 200), corpus, "train")
    sizes = [len(text.encode()) for text in TEXTS]
    assert (found.unscored, found.tokens, found.bytes) == (5, sum(sizes) - 5, sum(sizes) - 5)
    assert (found.documents, found.words) == (4, 5 + 4 + 16 + 4)  # the third is one letter, and nothing of it is scored
    nll = sum(-lm.loglikelihood(list(text.encode()[:1]), list(text.encode()[1:])) for text in TEXTS if len(text) > 1)
    assert found.scores["bits_per_byte"].value == pytest.approx(nll / found.bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"split": "valid"}, "corpus has no text in its valid split: name another with --split"),
        ({"split": "dev"}, "corpus has no split 'dev': it has train, valid, test"),
        ({"context": 9}, "context must be in 1 … 8, the tokens that are read, got 9"),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(corpus, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        perplexity(Reader(speller(), 8), corpus, **{"split": "train"} | change)
