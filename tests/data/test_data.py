"""Text to batches: nothing lost, every window once an epoch, documents apart, and exactly resumable."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.core.config import ConfigError
from llm_jax.data import pipeline, tokenized
from llm_jax.data.corpora import Jsonl, StandardLibrary, TextFiles
from llm_jax.data.kinds import KINDS, NO_KIND, kinds
from llm_jax.data.packing import ConcatThenSplit
from llm_jax.data.pipeline import Data
from llm_jax.data.shuffle import shuffled
from llm_jax.data.tokenizers import Bytes, Characters, SentencePiece


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "naïve", "日本語", "def f(x):", "\treturn x", "0.5"]
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(30)))
    return TextFiles(path=str(folder), split="file", valid_fraction=0.2, test_fraction=0.1)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request, corpus, tmp_path_factory):
    return SentencePiece(vocabulary=300, kind=request.param).fit(corpus, tmp_path_factory.mktemp("cache"))


@given(st.text())
def test_bytes_lose_nothing(text):
    tokenizer = Bytes().fit(None, "")
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_subwords_lose_nothing_and_are_the_librarys(subwords):
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        ids = subwords.encode(text)
        assert subwords.decode(ids) == text and subwords.byte_lengths[ids].sum() == len(text.encode())
        if "▁" not in text:
            assert ids.tolist() == subwords._processor.encode(text)

    check()
    assert subwords.decode(subwords.encode("a ▁ b")) == "a ▁ b"


def test_characters_know_their_corpus_only(corpus):
    tokenizer = Characters().fit(corpus, "")
    text = next(corpus.documents("train"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ConfigError, match="does not know the character 'Ω'"):
        tokenizer.encode("alpha Ω")


def test_splits_are_disjoint_and_whole(corpus):
    parts = [set(corpus.documents(split)) for split in ("train", "valid", "test")]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_the_tail_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 90 + "y" * 10)
    corpus = TextFiles(path=str(tmp_path / "a.txt"))
    assert list(corpus.documents("train")) == ["x" * 90] and list(corpus.documents("valid")) == ["y" * 10]


def test_the_standard_library_is_the_same_in_every_process():
    corpus = StandardLibrary(megabytes=0.3)
    code = "from llm_jax.data.corpora import StandardLibrary; print(StandardLibrary(megabytes=0.3).fingerprint())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    )
    assert other.stdout.strip() == corpus.fingerprint()
    names = [name for name, _ in StandardLibrary().named()]
    assert len(names) == len(set(names)) and any(n.startswith("pydoc_data/topics.py:") for n in names)
    assert not [n for n in names if "/test/" in n or n.startswith(("test/", "site-packages/", "encodings/"))]


def test_windows_are_what_a_loop_over_documents_gives(corpus, tmp_path):
    tokenizer = Bytes().fit(corpus, tmp_path)
    tokens, length = tokenized.tokenize(corpus, tokenizer, "valid", tmp_path), 16
    flat, document, place = [], [], []
    for number, text in enumerate(corpus.documents("valid")):
        ids = [*text.encode(), 256]
        flat += ids
        document += [number] * len(ids)
        place += list(range(len(ids)))
    assert tokens.ids[:].tolist() == flat
    rows = ConcatThenSplit().rows(tokens, length, tmp_path)
    batch = rows.gather(np.arange(len(rows)))
    for row in range(len(batch.tokens)):
        at = range(row * length, (row + 1) * length)
        assert (
            batch.tokens[row].tolist() == flat[at.start : at.stop]
            and batch.targets[row].tolist() == flat[at.start + 1 : at.stop + 1]
        )
        assert batch.weights[row].tolist() == [float(document[i] == document[i + 1]) for i in at]
        assert batch.segments[row].tolist() == [document[i] - document[at.start] for i in at]
        assert batch.positions[row].tolist() == [min(place[i], i - at.start) for i in at]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_every_epoch_is_a_permutation_of_its_own(size):
    epochs = [shuffled(np.arange(e * size, (e + 1) * size), size, seed=3) for e in range(3)]
    assert all(sorted(e) == list(range(size)) for e in epochs)
    if size >= 64:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != shuffled(np.arange(size), size, seed=4)).any()
        assert abs(np.corrcoef(epochs[0], np.arange(size))[0, 1]) < 0.3


def test_the_order_is_a_function_of_seed_and_step(corpus, tmp_path):
    data = Data(corpus=corpus, sequence_length=16, batch_size=4)
    rows = pipeline.rows_of(data, Bytes().fit(corpus, tmp_path), "train", tmp_path)
    source = lambda seeds, k: pipeline.dispatches(data, rows, seeds=seeds, steps_per_item=k, steps=100)  # noqa: E731

    def steps(count, *, seeds, k, start=0):
        feed = pipeline.feed(source(seeds, k), start_step=start)
        return np.concatenate([next(feed).tokens for _ in range(count // k)], 1)

    alone = steps(12, seeds=[5], k=1)
    np.testing.assert_array_equal(steps(12, seeds=[9, 5], k=3)[1:], alone)
    np.testing.assert_array_equal(steps(8, seeds=[5], k=2, start=4), alone[:, 4:])
    feed = pipeline.feed(source([5], 2))
    next(feed)
    state = json.loads(json.dumps(feed.get_state()))
    rest = [next(feed).tokens for _ in range(3)]
    again = pipeline.feed(source([5], 2))
    again.set_state(state)
    np.testing.assert_array_equal([next(again).tokens for _ in range(3)], rest)


def test_evaluation_counts_every_target_once(corpus, tmp_path):
    data = Data(corpus=corpus, sequence_length=32, packing=ConcatThenSplit(document_masks=False))
    fitted = Bytes().fit(corpus, tmp_path)
    rows = pipeline.rows_of(data, fitted, "valid", tmp_path)
    batches = pipeline.evaluation_batches(rows, batch=8, byte_lengths=fitted.byte_lengths, limit_bytes=None)
    assert batches.weights.sum() == len(rows[0]) * 32


def test_every_tokenizer_is_scored_on_the_same_text(subwords, corpus, tmp_path):
    tokenizer, limit = subwords, 600
    for fitted in (tokenizer, Bytes().fit(corpus, tmp_path)):
        data = Data(corpus=corpus, sequence_length=8, packing=ConcatThenSplit(document_masks=False))
        rows = pipeline.rows_of(data, fitted, "valid", tmp_path)
        batches = pipeline.evaluation_batches(rows, batch=2, byte_lengths=fitted.byte_lengths, limit_bytes=limit)
        scored = (fitted.byte_lengths[batches.targets] * batches.weights).sum()
        assert limit - 8 * fitted.byte_lengths.max() < scored <= limit


def test_mistakes_are_sentences(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    for corpus, sentence in [
        (TextFiles(path=str(tmp_path / "none.txt")), "finds no file"),
        (TextFiles(path=str(tmp_path / "bad.txt")), r"is not UTF-8 at byte 3 \(0xff\)"),
        (TextFiles(path=str(tmp_path / "empty.txt")), "is an empty corpus"),
        (Jsonl(path=str(tmp_path / "bad.jsonl")), "line 2, is not JSON"),
        (Jsonl(path=str(tmp_path / "other.jsonl")), "line 1, has no text under 'text'"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            list(corpus.documents("train"))


def test_tokens_have_kinds():
    table = {
        b" return": "keyword", b"None": "keyword", b"42": "number", b" self_": "word", b"Value": "capitalized word", b"_": "word",
        b"):": "punctuation", b"\n    ": "space", b"x1": None, b"caf\xc3\xa9": None, b"": None, b"\xff": None,
    }  # fmt: skip
    found = kinds([b"42", *table])  # the first of two that stand for the same text is a byte in reserve
    assert found[0] == NO_KIND
    assert [None if k == NO_KIND else KINDS[k] for k in found[1:]] == list(table.values())
    assert Bytes().fit(None, None).kinds[ord("7")] == KINDS.index("number")
