"""What a SentencePiece model is trained on: every line, or as many as there is room for from the whole train split."""

import io
import random

import pytest
import sentencepiece

from llm_jax.data import tokenizers
from llm_jax.data.corpora import TextFiles
from llm_jax.data.tokenizers import SentencePiece

FIRST, LATER = ["alpha", "beta", "gamma", "delta", "epsilon", "iota"], ["zurich", "wxyz", "quux", "zzyzx", "vow", "jazz"]


def library(lines, room=2_000_000, longest=1 << 20):
    """The model that the library alone makes of lines, told only to leave them as they are."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=290, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=longest, num_threads=1, input_sentence_size=room,
        shuffle_input_sentence=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def lines(tmp_path):
    """Lines in two files, of other words each; an empty one counts for nothing."""
    rng = random.Random(0)
    made = [" ".join(rng.choices(words, k=8)) for words, count in ((FIRST, 300), (LATER, 3000)) for _ in range(count)]
    (tmp_path / "a.txt").write_text("\n\n".join(made[:300]))
    (tmp_path / "b.txt").write_text("\n".join(made[300:]) + "\n")
    return made


@pytest.fixture
def corpus(lines, tmp_path):
    return TextFiles(path=str(tmp_path), valid_fraction=0.0)


def trained(corpus, tmp_path):
    return SentencePiece(vocabulary=290).fit(corpus, tmp_path / "cache").model


def test_all_lines_are_trained_on(lines, corpus, tmp_path):
    assert trained(corpus, tmp_path) == library(lines)


@pytest.mark.parametrize("room, every", [(300, 11), (1100, 3), (3299, None)])
def test_of_too_many_lines_an_even_sample_is(room, every, lines, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "LINES", room)
    sample = list(tokenizers._sample(corpus))
    assert len(sample) == room and (sample == lines[::every] if every else sample == [lines[0], *lines[2:]])
    assert trained(corpus, tmp_path) == library(sample, room)


def test_long_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "LONGEST", 4000)
    text = "\n".join([" ".join(LATER * 300), "é" * 1999, "日" * 1400, " ".join(FIRST)])
    (tmp_path / "a.txt").write_text(text)
    first, whole, wide, last = text.split("\n")
    cut = [*(first[at : at + 1000] for at in range(0, len(first), 1000)), whole, wide[:1000], wide[1000:], last]
    found = trained(TextFiles(path=str(tmp_path), valid_fraction=0.0), tmp_path)
    assert found == library(cut, longest=4000) != library([whole, last], longest=4000)
