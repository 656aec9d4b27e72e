"""How texts are cut into rows, against lm-evaluation-harness's own functions and against what each window must be."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_jax
from llm_jax.core.config import ConfigError
from llm_jax.data.corpora import TextFiles
from llm_jax.data.tokenizers import Characters, SentencePiece
from llm_jax.evaluation.reading import LENGTH, Reader, longest, reader
from llm_jax.models.encoder import Encoder
from tests.evaluation.models import LEARNED, speller
from tests.test_facade import GOLDEN, TEMPLATE

LM = speller()


def reads(length=8) -> Reader:
    return Reader(LM, length)


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("context", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 40])
def test_every_token_is_scored_once_after_all_that_the_length_gives(count, context):
    seen = []
    for number, window in enumerate(reads().windows(range(count), context)):
        row = [*range(-1, count)]  # -1: what a text comes after
        assert len(window.row) <= 9
        new = window.row[window.first :]
        before = window.row[: window.first]
        start = row.index(new[0])
        assert [-1 if i == 256 else i for i in before] == row[start - len(before) : start]
        assert number == 0 or (len(before) >= context and len(window.row) == 9)
        seen += new
    assert seen == list(range(count))


@given(st.integers(0, 60), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_are_those_of_the_harness(count, length, data):
    utils = pytest.importorskip("lm_eval.utils")
    context = data.draw(st.integers(1, length))
    theirs = [
        (list(before), list(new))
        for before, new in map(
            utils.make_disjoint_window, utils.get_rolling_token_windows(list(range(count)), 256, length, context)
        )
    ]
    mine = [(w.row[: w.first], w.row[w.first :]) for w in reads(length).windows(range(count), context)]
    # a window that begins with the text sees all before it; the harness gives a later one that reaches back so far the same
    assert mine == theirs


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def subwords(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog and on and on\n" * 40)
    return SentencePiece(vocabulary=300).fit(TextFiles(path=str(folder / "a.txt")), folder)


@pytest.fixture(scope="module")
def subword_reader(tmp_path_factory):
    tokenizer = subwords(tmp_path_factory)
    return Reader(dataclasses.replace(speller(), vocabulary=300, tokenizer=tokenizer, end=(2,), start=2), 1000)


WORDS = st.lists(st.sampled_from(["the", " fox", " ", "  ", "jum", "ps", " on", "é", "\n", "over"]), max_size=5).map("".join)


@given(WORDS, WORDS)
@settings(max_examples=150, deadline=None)
def test_pairs_are_those_of_the_harness(subword_reader, context, continuation):
    model = pytest.importorskip("lm_eval.api.model")
    if not continuation or not context.strip():
        return

    class Theirs(model.TemplateLM):
        eot_token_id = 2
        tok_encode = staticmethod(lambda text, **_: subword_reader.ids(text))
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

    before, after = Theirs()._encode_pair(context, continuation)
    mine, cut = subword_reader.pair(context, continuation)
    assert not cut
    if after:
        assert (mine.row[: mine.first], mine.row[mine.first :]) == (before, after)
    else:  # which the harness refuses to score
        assert subword_reader.lm.tokenizer.decode(mine.row).endswith(continuation) and mine.first < len(mine.row)


def test_what_does_not_fit_is_cut_on_the_left():
    request, cut = reads().pair("a" * 20, "bcd")
    assert (bytes(request.row), request.first, cut) == (b"aaaaaabcd", 6, True)  # the last token is not read
    request, cut = reads().pair("a" * 6, "bcd")
    assert (len(request.row), cut) == (9, False)
    assert reads().pair("a" * 6, "b" * 8)[0].first == 1
    with pytest.raises(ConfigError, match="'bbbbbbbbb' has 9 tokens to be scored, and the model reads 8"):
        reads().pair("a", "b" * 9)
    assert reads().prompt("abcdefghijk", 3) == ([*b"ghijk"], True)
    assert reads().prompt("abc", 3) == ([*b"abc"], False)
    with pytest.raises(ConfigError, match="max_tokens is 8, which leaves no room for a context in the 8 tokens that are read"):
        reads().prompt("abc", 8)


def test_an_empty_context_is_what_texts_begin_with():
    assert reads().pair("", "ab")[0].row == [256, *b"ab"]
    assert reads().pair("  ", "ab")[0].row == [256, *b"  ab"]
    assert reads().prompt("", 3) == ([256], False)
    bare = Reader(speller(start=None, end=()), 8)
    for call in (lambda: bare.pair("", "a"), lambda: bare.prompt("", 1)):
        with pytest.raises(ConfigError, match="a context is empty, and this model has no token that a text begins with"):
            call()
    assert [(w.row, w.first) for w in bare.windows([5, 6, 7])] == [([5, 6, 7], 1)]
    assert not list(bare.windows([5]))


def test_what_the_tokenizer_puts_before_a_text_is_read_and_not_scored(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "m")
    pieces = ["<pad>", "<s>", "</s>", *"abcdefg"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i]} | special for i in range(3)],
        "post_processor": TEMPLATE,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []},
    }
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    lm = llm_jax.load(tmp_path / "m")
    found = reader(lm, 32)
    assert found.pair("ab", "c")[0].row == [1, 3, 4, 5] and found.pair("ab", "c")[0].first == 3
    assert found.pair("", "c")[0].row == [1, 5]
    assert [(w.row, w.first) for w in found.windows([3, 4])] == [([1, 3, 4], 1)]
    with pytest.raises(ConfigError, match="has no chat template"):
        found.chat([{"role": "user", "content": "a"}])
    chats = reader(lm, 32, chats=True)
    said = chats.chat([{"role": "user", "content": "ab"}])
    assert said == "<s>ab</s><s>" and chats.ids(said) == [1, 3, 4, 2, 1]  # and no second <s> before it
    assert chats.chat([{"role": "assistant", "content": "ab"}], answering=False) == "<s>ab"
    with pytest.raises(ConfigError, match="has no chat template: what is trained here has none"):
        reader(speller(), chats=True)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_model_reads_as_much_as_it_says(tmp_path):
    assert longest(speller()) == LENGTH and longest(speller(LEARNED)) == 16
    shutil.copytree(GOLDEN / "llama", tmp_path / "m")
    told = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(told | {"max_position_embeddings": 77}))
    assert longest(llm_jax.load(tmp_path / "m")) == 77


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: reader(llm_jax.load(GOLDEN / "gpt2")), "gpt2 has no tokenizer, and what is scored are texts"),
        (
            lambda: reader(llm_jax.load(GOLDEN / "bert")),
            "model is not causal: .*, so it scores no text from left to right$",
        ),
        (
            lambda: reader(speller(Encoder(width=16, depth=1), trial=SimpleNamespace(result={"arm": "masked"}))),
            r"so it scores no text from left to right \(this is the arm 'masked': --arm names another\)$",
        ),
        (lambda: reader(speller(LEARNED), 17), "length is 17, but the model has learned only 16 positions"),
        (lambda: reader(speller(), 0), "length must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()


def test_a_character_that_the_tokenizer_lacks_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    tokenizer = Characters().fit(TextFiles(path=str(tmp_path / "a.txt")), tmp_path)
    with pytest.raises(ConfigError, match="does not know the character 'z'"):
        Reader(speller(tokenizer=tokenizer), 8).pair("a", "z")
