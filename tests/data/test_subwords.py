"""WordPiece, byte-level BPE and SentencePiece: against their definitions, the libraries, and themselves read back from files."""

import io
import json
import pathlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core.config import ConfigError
from llm_jax.core.written import override_text
from llm_jax.data import pieces
from llm_jax.data.corpora import TextFiles
from llm_jax.data.tokenizer_json import SPECIALS, ByteLevelBPE, FromJson, HuggingFace, WordPiece
from llm_jax.data.tokenizers import Bytes, SentencePiece
from llm_jax.io import tokenizer_json
from llm_jax.lab.experiment import Experiment

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ANY = st.text(st.characters(exclude_categories=["Cs"]))
KINDS = {
    "word-piece": WordPiece(vocabulary=120),
    "uncased": WordPiece(vocabulary=120, lowercase=True),
    "byte-level": ByteLevelBPE(vocabulary=300),
    "bpe": SentencePiece(vocabulary=300),
    "unigram": SentencePiece(vocabulary=300, kind="unigram"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "Gamma", "naïve", "日本語", "def f(x):", "\treturn x", "0.5", "alphabet"]
    words += ["".join(rng.choice(list("abehlpt"), 5)) for _ in range(80)]
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(30)) + "  \n")
    return TextFiles(path=str(folder), split="file", valid_fraction=0.2)


@pytest.fixture(scope="module")
def fitted(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {name: kind.fit(corpus, cache) for name, kind in KINDS.items()}


# ── by definition ────────────────────────────────────────────────────────────────────────────────────────────────────
def words_of(text, lowercase):
    """BERT's basic tokenizer, plainly."""
    kept = "".join(
        " " if c.isspace() or unicodedata.category(c) == "Zs" else c
        for c in text
        if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c)[0] != "C")
    )
    kept = "".join(f" {c} " if 0x4E00 <= ord(c) <= 0x9FFF else c for c in kept)
    if lowercase:
        kept = "".join(c for c in unicodedata.normalize("NFD", kept) if unicodedata.category(c) != "Mn").lower()
    for c in set(kept):
        if unicodedata.category(c)[0] == "P" or (c.isascii() and c.isprintable() and not c.isalnum() and c != " "):
            kept = kept.replace(c, f" {c} ")
    return kept.split()


def longest_first(word, ids):
    """Devlin et al. 2019: from the left, the longest piece that there is; the whole word is unknown where there is none."""
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in ids), None)
        if end is None or len(word) > 100:
            return [ids["[UNK]"]]
        found.append(ids[prefix + word[start:end]])
        start = end
    return found


@pytest.mark.parametrize("name", ["word-piece", "uncased"])
def test_word_piece_is_longest_match_first(name, fitted):
    tokenizer = fitted[name]
    ids = json.loads(tokenizer.json)["model"]["vocab"]

    def expected(text):
        return [i for word in words_of(text, KINDS[name].lowercase) for i in longest_first(word, ids)]

    letters = st.text("alphbetGmnïv日本x().5 \t\n\0É", max_size=30)

    @given(letters)
    @settings(max_examples=200, deadline=None)
    def check(text):
        assert tokenizer.encode(text).tolist() == expected(text), text

    check()
    for text in ["Alpha alphabet, gamma!", "a" * 101, "naïve NAÏVE", "[SEP] alpha"]:
        assert tokenizer.encode(text).tolist() == expected(text), text


def test_word_piece_is_what_transformers_makes_of_a_table_of_texts():
    stored = json.loads((GOLDEN / "wordpiece.json").read_text())
    for lowercase in (True, False):
        ours = FromJson(WordPiece(lowercase=lowercase).described(stored["pieces"]).to_str())
        for text, ids in stored["cased" if not lowercase else "uncased"]:
            assert ours.encode(text).tolist() == ids, text


# ── trained ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_training_again_gives_the_same(corpus, fitted, tmp_path):
    for name, kind in KINDS.items():
        again = kind.fit(corpus, tmp_path)
        assert again.fingerprint == fitted[name].fingerprint and again.vocabulary == kind.vocabulary, name


@pytest.mark.parametrize("name", ["byte-level", "bpe", "unigram"])
def test_the_lossless_lose_nothing_and_know_their_places(name, fitted):
    tokenizer = fitted[name]
    assert tokenizer.lossless

    @given(ANY | st.text("alphbet ▁日\r\n\0 \x1b<>|endoftx"))
    @settings(deadline=None)
    def check(text):
        ids, places = tokenizer.spans(text)
        assert ids.tolist() == tokenizer.encode(text).tolist() and tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        for i, (begin, end) in zip(ids, places, strict=True):
            assert tokenizer.piece_bytes[i] in text[begin:end].encode() and (end - begin) <= len(tokenizer.piece_bytes[i])

    check()
    for text in ["a<|endoftext|></s>", "é" * 3, "<0x41>", "\ufeff"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["bytes", "byte-level", "bpe", "unigram"])
def test_every_string_of_bytes_has_its_ids(name, fitted):
    """Also what is no UTF-8: an id a byte."""
    tokenizer = fitted.get(name) or Bytes().fit(None, "")
    place = {piece: i for i, piece in enumerate(tokenizer.piece_bytes)}

    @given(st.binary())
    def check(raw):
        ids = [place[bytes([b])] for b in raw]
        assert b"".join(tokenizer.piece_bytes[i] for i in ids) == raw
        assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")

    check()


def test_byte_level_is_the_librarys(corpus, fitted):
    library = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()  # what the library itself calls GPT-2's
    library.train_from_iterator(
        corpus.documents("train"), 300, min_frequency=0, special_tokens=["<|endoftext|>"], show_progress=False
    )
    for text in [*corpus.documents("valid"), "  two  spaces\n\n", "Übergröße 🙂"]:
        assert fitted["byte-level"].encode(text).tolist() == library.encode(text).ids
    assert fitted["byte-level"].end == library.token_to_id("<|endoftext|>")


def test_what_word_piece_loses(corpus, fitted):
    tokenizer = fitted["word-piece"]
    assert not tokenizer.lossless and tokenizer.end == SPECIALS.index("[SEP]")
    assert tokenizer.decode(tokenizer.encode("alpha  beta\n\tf(x)")) == "alpha beta f ( x )"
    assert fitted["uncased"].decode(fitted["uncased"].encode("Naïve")) == "naive"
    assert tokenizer.encode("Ω").tolist() == [tokenizer.unknown] and tokenizer.decode(tokenizer.encode("alpha Ω")) == "alpha"


@pytest.mark.parametrize("name", ["word-piece", "uncased"])
def test_lengths_that_are_measured_sum_to_the_text(name, corpus, fitted):
    tokenizer = fitted[name]
    total = sum(len(text.encode()) for text in corpus.documents("train"))
    assert sum(tokenizer.byte_lengths[tokenizer.encode(text)].sum() for text in corpus.documents("train")) == pytest.approx(total)
    valid = sum(len(text.encode()) for text in corpus.documents("valid"))
    measured = sum(tokenizer.byte_lengths[tokenizer.encode(text)].sum() for text in corpus.documents("valid"))
    assert measured == pytest.approx(valid, rel=0.02)


def test_lengths_are_measured_on_the_first_text_only(corpus, fitted, monkeypatch):
    monkeypatch.setattr(pieces, "MEASURED", 50)
    first = next(corpus.documents("train"))[:50]
    tokenizer = WordPiece(vocabulary=120)
    lengths = FromJson(fitted["word-piece"].json, corpus=corpus).byte_lengths
    assert lengths[fitted["word-piece"].encode(first)].sum() == pytest.approx(len(first.encode())) and tokenizer.vocabulary == 120


def test_an_experiment_takes_them_by_name():
    for text, kind in [("WordPiece(vocabulary=99,lowercase=True)", WordPiece(99, True)), ("ByteLevelBPE(512)", ByteLevelBPE(512))]:
        assert override_text(Experiment(), [f"tokenizer={text}"]).tokenizer == kind


def test_mistakes_are_sentences(corpus, tmp_path):
    for build, sentence in [
        (lambda: ByteLevelBPE(257), "vocabulary must be > 257"),
        (lambda: WordPiece(5), r"vocabulary must be > 5 \(the specials\), got 5"),
        (
            lambda: ByteLevelBPE(4096).fit(corpus, tmp_path),
            "tokenizer.vocabulary cannot be 4096 for this corpus: it has no more than",
        ),
        (lambda: WordPiece(20).fit(corpus, tmp_path), "cannot be 20 for this corpus: its single characters are"),
        (lambda: SentencePiece(40_000).fit(corpus, tmp_path), r"cannot be 40000 for this corpus: it has no more than \d+ pieces"),
        (lambda: SentencePiece(262).fit(corpus, tmp_path), r"cannot be 262 for this corpus: its single characters are \d+ already"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            build()
    with pytest.raises(ConfigError, match=r"data.corpus has no text in its train split"):
        SentencePiece(300).fit(TextFiles(path=corpus.path, split="file", valid_fraction=0.99), tmp_path)
    assert not list(tmp_path.glob("tokenizers/*"))


def test_an_interruption_of_training_is_one(corpus, tmp_path, monkeypatch):
    def interrupted(**_):
        raise RuntimeError("INTERNAL: KeyboardInterrupt: <EMPTY MESSAGE>")

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SentencePiece(300).fit(corpus, tmp_path)


# ── read and written ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_loaded(name, corpus, fitted, tmp_path):
    tokenizer = fitted[name]
    tokenizer_json.save(tokenizer, tmp_path / "t")
    loaded = [HuggingFace(path=str(tmp_path / "t")).fit(corpus, tmp_path)]
    if name in ("bpe", "unigram"):
        tokenizer_json.save(tokenizer, tmp_path / "t.model")
        loaded += [SentencePiece(path=str(file)).fit(corpus, "") for file in (tmp_path / "t.model", tmp_path / "t/tokenizer.model")]
    for again in loaded:
        assert (again.vocabulary, again.end, again.lossless) == (tokenizer.vocabulary, tokenizer.end, tokenizer.lossless)
        np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
        for text in [*corpus.documents("valid"), "Ω naïve ▁ 日本", "a\r\n b"]:
            assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert again.decode(again.encode(text)) == tokenizer.decode(again.encode(text))
    with pytest.raises(ConfigError, match="is there already: name another place"):
        tokenizer_json.save(tokenizer, tmp_path / "t")


def test_a_place_for_another_kind_of_file_is_refused(tmp_path, fitted):
    with pytest.raises(ConfigError, match="can only be written by SentencePiece: name a folder"):
        tokenizer_json.save(fitted["byte-level"], tmp_path / "t.model")
    with pytest.raises(ConfigError, match="name a folder"):
        tokenizer_json.save(Bytes().fit(None, ""), tmp_path / "tokenizer.json")


def sentencepiece_model(**changes) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False} | changes
    settings = {"byte_fallback": True, "vocab_size": 290, "minloglevel": 2, "hard_vocab_limit": False, "num_threads": 1} | settings
    lines = iter(["the cat sat on the mat", "a cat, ﬁne"] * 30)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    return model.getvalue()


LOSSY = {
    "dummy prefix": {"add_dummy_prefix": True},
    "normal form": {"normalization_rule_name": "nmt_nfkc"},
    "fewer spaces": {"remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False, "vocab_size": 40},
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_sentencepiece_model_that_changes_text_says_so(case, corpus, tmp_path):
    import sentencepiece

    (tmp_path / "t.model").write_bytes(sentencepiece_model(**LOSSY[case]))
    tokenizer = SentencePiece(path=str(tmp_path / "t.model")).fit(corpus, "")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert not tokenizer.lossless
    for text in ["the cat", "a  ▁ ﬁne", " 日本 cat "]:
        ids = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text) and tokenizer.decode(ids) == library.decode(ids.tolist())
    with pytest.raises(ConfigError, match="loses where its pieces stand"):
        tokenizer.spans("the")
    files = tokenizer_json.save(tokenizer, tmp_path / "out")
    assert [file.name for file in files] == ["tokenizer.model", "tokenizer_config.json"]
    again = SentencePiece(path=str(files[0])).fit(corpus, "")
    assert again.fingerprint == tokenizer.fingerprint


def test_a_sentencepiece_model_that_keeps_text_says_so(corpus, tmp_path):
    (tmp_path / "t.model").write_bytes(sentencepiece_model())
    tokenizer = SentencePiece(path=str(tmp_path / "t.model")).fit(corpus, "")
    assert tokenizer.lossless and tokenizer.decode(tokenizer.encode("  ﬁ ▁ ")) == "  ﬁ ▁ "


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_transformers_encodes_alike_what_was_trained_here(name, corpus, fitted, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_json.save(fitted[name], tmp_path / "t")
    libraries = [transformers.AutoTokenizer.from_pretrained(tmp_path / "t")]
    if isinstance(KINDS[name], WordPiece):
        ids = json.loads(fitted[name].json)["model"]["vocab"]
        (tmp_path / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.__getitem__)) + "\n")
        libraries.append(transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=KINDS[name].lowercase))
    for library in libraries:
        for text in [*corpus.documents("valid"), "Übergröße, naïve  日本\n\t(x) ", "Ω alpha"]:
            assert library.encode(text, add_special_tokens=False) == fitted[name].encode(text).tolist()
        end = library.eos_token_id if library.eos_token_id is not None else library.sep_token_id
        assert end == fitted[name].end
