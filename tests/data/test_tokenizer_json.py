"""A tokenizer.json of every kind, made by the library `tokenizers` itself: the same ids, and the bytes that they stand for."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llm_jax.core.config import ConfigError
from llm_jax.data.tasks import Recall
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizer_json import HuggingFace

TEXTS = ["the cat sat on the mat", "naïve café, 日本語", "def f(x):\n\treturn x + 0.5", "a▁b"] * 3
END = "<|endoftext|>"


def byte_level(**step):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | step)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    return tokenizer


def byte_fallback(prepend=False):
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thecasonm", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


def marked(mark, level):
    """Byte pairs whose pieces say where words end or go on, over bytes or characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", **mark))
    if level == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False, **mark)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def composed():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture
def saved(tmp_path):
    def save(tokenizer, **files):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return str(tmp_path)

    return save


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_nothing_is_lost_and_the_ids_are_the_librarys(make, saved):
    library = make()
    fitted = HuggingFace(path=saved(library)).fit(None, "")
    library.no_padding()
    library.no_truncation()
    assert fitted.lossless and fitted.vocabulary == library.get_vocab_size()

    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["the ", "▁", "<tool>", END, "<s>"])).map(
            "".join
        )
    )
    @settings(max_examples=50, deadline=None)
    def check(text):
        ids = fitted.encode(text)
        assert fitted.decode(ids) == text and fitted.byte_lengths[ids].sum() == len(text.encode())
        if "<" not in text and "▁" not in text:
            assert ids.tolist() == library.encode(text, add_special_tokens=False).ids

    check()
    for text in ["the cat <|endoftext|> <s> the", "a ▁ b", " the"]:
        assert b"".join(fitted.piece_bytes[i] for i in fitted.encode(text)) == text.encode()
    assert len(fitted.encode("the the")) < 6  # merged, not spelt


@pytest.mark.parametrize(
    "make",
    [word_piece, composed, lambda: byte_fallback(prepend=True), lambda: byte_level(add_prefix_space=True)],
    ids=["word-piece", "normal-form", "prepended-space", "prefix-space"],
)
def test_what_loses_something_says_so(make, saved):
    library = make()
    fitted = HuggingFace(path=saved(library)).fit(None, "")
    library.no_padding()
    library.no_truncation()
    ids = fitted.encode("the cat")
    assert not fitted.lossless and ids.tolist() == library.encode("the cat", add_special_tokens=False).ids
    assert fitted.decode(ids) == library.decode(ids.tolist())
    assert b"".join(fitted.piece_bytes[i] for i in ids).strip() == b"the cat"


@pytest.mark.parametrize("level", ["bytes", "characters"])
@pytest.mark.parametrize("mark", [{"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}], ids=["suffix", "prefix"])
def test_marks_of_words_are_no_text(mark, level, saved):
    library = marked(mark, level)
    fitted = HuggingFace(path=saved(library)).fit(None, "")
    ids = fitted.encode("the cat sat on the hat")
    assert ids.tolist() == library.encode("the cat sat on the hat").ids and not fitted.lossless
    assert fitted.byte_lengths[ids].sum() == len("the cat sat on the hat" if level == "bytes" else "thecatsatonthehat")
    (sign,) = mark.values()
    assert any(sign in library.id_to_token(i) for i in ids) and not any(sign.encode() in fitted.piece_bytes[i] for i in ids)


def test_merges_are_dropped_in_training_only(saved):
    tokenizer = byte_level()
    plain = HuggingFace(path=saved(tokenizer)).fit(None, "")
    tokenizer.model.dropout = 0.5
    fitted = HuggingFace(path=saved(tokenizer)).fit(None, "")
    text = "the cat sat on the mat " * 20
    assert fitted.encode(text).tolist() == plain.encode(text).tolist()
    assert tokenizers.Tokenizer.from_str(fitted.json).model.dropout is None


def test_specials_are_text_unless_they_are_asked_for(saved):
    path = saved(byte_level())
    plain, special = (HuggingFace(path=path, specials=specials).fit(None, "") for specials in (False, True))
    end = plain._tokenizer.token_to_id(END)
    assert end not in plain.encode(f"a{END}") and special.encode(f"a{END}").tolist()[-1] == end
    assert plain.lossless and not special.lossless and plain.fingerprint != special.fingerprint
    assert plain.piece_bytes[end] == b"" and plain.encode("").dtype == np.int32


def test_the_end_is_what_the_files_beside_say(saved):
    tokenizer = byte_level()
    end = tokenizer.token_to_id(END)
    assert HuggingFace(path=saved(tokenizer)).fit(None, "").end is None
    assert HuggingFace(path=saved(tokenizer, config={"eos_token_id": [5, 6]})).fit(None, "").end == 5
    assert HuggingFace(path=saved(tokenizer, tokenizer_config={"eos_token": {"content": END}})).fit(None, "").end == end


def test_tokenizers_with_other_ends_do_not_share_tokens(saved, tmp_path):
    tokenizer, corpus = byte_level(), Recall(length=20, rows=3, distances=(1,))
    found = []
    for end in (None, "<tool>", END):
        fitted = HuggingFace(path=saved(tokenizer, tokenizer_config={"eos_token": end})).fit(None, "")
        tokens = tokenize(corpus, fitted, "train", tmp_path / "cache")
        found.append(fitted.fingerprint)
        assert tokens.end == fitted.end and (end is None or tokens.ids[:][tokens.starts[1] - 1] == tokenizer.token_to_id(end))
    assert len(set(found)) == 3


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        HuggingFace(path=str(tmp_path)).fit(None, "")
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"take SentencePiece\(path='.*spiece.model'\)"):
        HuggingFace(path=str(tmp_path)).fit(None, "")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        HuggingFace(path=str(tmp_path / "tokenizer.json")).fit(None, "")
