"""Texts encoded in batches, parts and threads: the ids that the libraries give to each text by itself."""

import dataclasses
import itertools
import json
import os
import threading

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from llm_jax.core.config import ConfigError
from llm_jax.data import encoding
from llm_jax.data.corpora import Jsonl, TextFiles
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer_json import ByteLevelBPE, FromJson, WordPiece
from llm_jax.data.tokenizers import Bytes, Characters, SentencePiece

KINDS = {
    "bytes": Bytes(),
    "bpe": SentencePiece(vocabulary=300),
    "unigram": SentencePiece(vocabulary=300, kind="unigram"),
    "byte-level": ByteLevelBPE(vocabulary=360),
    "word-piece": WordPiece(vocabulary=120, lowercase=True),
}
CUT = ["bpe", "byte-level", "word-piece"]
MARK = "▁"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "naïve", "日本語", "def f(x):", "\treturn x", *["a\n\n    b"] * 5, "alphabet;", "'s", "<|endoftext|>"]
    words += ["".join(rng.choice(list("abehlpt"), 5)) for _ in range(60)]
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(30)))
    corpus = TextFiles(path=str(folder), split="file", valid_fraction=0.0)
    return {name: kind.fit(corpus, tmp_path_factory.mktemp("cache")) for name, kind in KINDS.items()}


def alone(tokenizer, text):
    """What the library itself gives for one text."""
    if tokenizer.json:
        library = tokenizers.Tokenizer.from_str(tokenizer.json)
        library.encode_special_tokens = True
        return library.encode(text, add_special_tokens=False).ids
    if tokenizer.model is None:
        return list(text.encode())
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    mark = [library.piece_to_id(f"<0x{b:02X}>") for b in MARK.encode()]
    first, *rest = (library.encode(part) for part in text.split(MARK))
    return first + [i for part in rest for i in mark + part]


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "alphbet'sn ▁日é\t\r\n\0\x1c\x85\u180e\u2028;().0<|endoftx>", max_size=60
)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_each_text_alone(name, threads, fitted, monkeypatch):
    tokenizer = fitted[name]
    assert (tokenizer._cut is not None) == (name in CUT)
    if name in CUT:
        monkeypatch.setattr(tokenizer, "_cut", dataclasses.replace(tokenizer._cut, size=3))

    @given(st.lists(TEXT, max_size=6), st.integers(1, 200))
    @settings(max_examples=60, deadline=None)
    def check(texts, batch):
        encoding.BATCH, before = batch, encoding.BATCH
        try:
            found = list(tokenizer.encode_all(texts, threads=threads))
        finally:
            encoding.BATCH = before
        assert [ids.tolist() for ids in found] == [alone(tokenizer, text) for text in texts]
        assert all(ids.dtype == np.int32 for ids in found)
        assert [tokenizer.encode(text).tolist() for text in texts] == [ids.tolist() for ids in found]

    check()


@pytest.mark.parametrize("name", CUT)
def test_runs_of_spaces_and_lines_stay_whole(name, fitted, monkeypatch):
    text = "a\n\n    b alpha\n\n    b's  \n  a"
    assert len(alone(fitted[name], text)) < len(text) - 5
    for size in range(1, 9):
        monkeypatch.setattr(fitted[name], "_cut", dataclasses.replace(fitted[name]._cut, size=size))
        assert fitted[name].encode(text).tolist() == alone(fitted[name], text)


def test_a_long_text_is_encoded_in_parts(fitted, monkeypatch):
    text = "alpha beta\n" * 20_000
    for name in CUT:
        tokenizer, sizes = fitted[name], []
        assert "".join(tokenizer._parts(text)) == text
        encode = tokenizer._encoded
        monkeypatch.setattr(tokenizer, "_encoded", lambda texts, encode=encode, sizes=sizes: sizes.append(texts) or encode(texts))
        assert tokenizer.encode(text).tolist() == alone(tokenizer, text)
        assert len(sizes) >= 3 and max(sum(map(len, texts)) for texts in sizes) < encoding.BATCH + 2 * tokenizer._cut.size


@given(TEXT, st.integers(1, 9))
def test_parts_are_the_text(text, size):
    for where in (encoding.AFTER_WORDS, encoding.AT_LINES):
        parts = encoding.Cut(where, size)(text)
        assert "".join(parts) == text and len(parts) >= 1
        assert all(len(part) >= size and after[0] in " \n" for part, after in itertools.pairwise(parts))


def spelt(**changes):
    """A tokenizer.json of GPT-2's words, changed so that what is after a word, or before it, may matter."""
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = changes.get("cutter", pre_tokenizers.ByteLevel(add_prefix_space=False))
    if "normalizer" in changes:
        tokenizer.normalizer = changes["normalizer"]
    tokenizer.add_tokens(changes.get("tokens", []))
    return tokenizer.to_str()


def test_texts_are_cut_only_where_it_is_known_to_make_no_difference():
    split = pre_tokenizers.Split(tokenizers.Regex(r"\w+\n?"), "isolated")
    lines = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert FromJson(spelt())._cut is not None
    assert FromJson(spelt(), specials=True)._cut is None
    for changes in [
        {"cutter": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"cutter": lines},
        {"cutter": pre_tokenizers.Sequence([split, lines])},
        {"cutter": pre_tokenizers.Metaspace()},
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Prepend("x")},
        {"tokens": ["a b"]},
    ]:
        assert FromJson(spelt(**changes))._cut is None, changes


def test_a_piece_with_a_line_end_inside_is_not_cut(fitted):
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(fitted["bpe"].model)
    model.pieces.add(piece="alpha\nbeta", score=0.0, type=proto.ModelProto.SentencePiece.USER_DEFINED)
    made = type(fitted["bpe"])(model.SerializeToString())
    assert made.lossless and made._cut is None
    assert made.encode("alpha\nbeta").tolist() == [made.vocabulary - 1]


def test_no_more_is_read_ahead_than_said(fitted, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 10 * (5 + encoding.EACH))
    for threads in (1, 2):
        read = []
        found = fitted["byte-level"].encode_all((read.append(i) or "alpha" for i in range(1000)), threads=threads)
        next(found)
        assert len(read) == 10 * (1 if threads == 1 else threads + 2)  # one more takes the place of the one that is done
        found.close()


def test_threads_work_at_once():
    """Each of two batches waits until the other has begun."""
    both = threading.Barrier(2, timeout=10)

    def encode(texts):
        both.wait()
        return [np.array([len(text)], np.int32) for text in texts]

    texts = ["a" * encoding.BATCH, "b" * (encoding.BATCH + 1)]
    assert [ids.tolist() for ids in encoding.encode_all(texts, lambda text: [text], encode, 2)] == [[len(t)] for t in texts]


def test_an_error_comes_through(fitted, tmp_path):
    (tmp_path / "t.txt").write_text("abc" * 10)
    tokenizer = Characters().fit(TextFiles(path=str(tmp_path)), "")
    for threads in (1, 2):
        with pytest.raises(ConfigError, match="does not know the character 'd'"):
            list(tokenizer.encode_all(["abc", "abd"], threads=threads))


@pytest.mark.parametrize("before, after", [(None, "false"), ("true", "true")])
def test_the_librarys_own_threads_are_off_unless_they_are_asked_for(before, after, fitted, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", before or "")
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    FromJson(fitted["byte-level"].json)
    assert os.environ["TOKENIZERS_PARALLELISM"] == after


def test_prepare_does_not_depend_on_threads(fitted, tmp_path):
    lines = [json.dumps({"text": text}) for text in ["alpha\nbeta", "", "a▁b", "naïve 日本", "x" * 5000] * 50]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = SentencePiece(path=str(tmp_path / "t.model"))
    (tmp_path / "t.model").write_bytes(fitted["bpe"].model)
    made = [
        prepare(Jsonl(path=str(tmp_path / "a.jsonl")), tokenizer, tmp_path / str(workers), cache=tmp_path, workers=workers)
        for workers in (1, 3)
    ]
    assert made[0]["files"] == made[1]["files"] and made[0]["splits"] == made[1]["splits"]
    assert sum(split["bytes"] for split in made[0]["splits"].values()) == 50 * (10 + 5 + 13 + 5000)
