"""Mixtures: each source's share, its epochs and its schedule, as functions of a running number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core.config import ConfigError, from_json, to_json
from llm_jax.core.written import parse
from llm_jax.data import pipeline
from llm_jax.data.apportion import apportion
from llm_jax.data.corpora import Corpus, Mixture, Source, StandardLibrary, TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.data.prepare import prepare
from llm_jax.data.shuffle import shuffled
from llm_jax.data.tasks import Recall
from llm_jax.data.tokenizers import Bytes, SentencePiece

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=2, max_size=6)


def constant(weights, total=1000, limits=None):
    return apportion([lambda _, w=w: w for w in weights], limits or [np.inf] * len(weights), total, changing=False)


@given(WEIGHTS, st.integers(0, 5000), st.integers(1, 300))
def test_any_stretch_is_that_of_reading_from_the_beginning(weights, start, count):
    turns = constant(weights)
    whose, which = turns.turns(0, start + count)
    for got, expected in zip(turns.turns(start, start + count), (whose, which), strict=True):
        np.testing.assert_array_equal(got, expected[start:])
    for source in range(len(weights)):  # each source's own, from its first on, none twice
        np.testing.assert_array_equal(which[whose == source], np.arange((whose == source).sum()))


@st.composite
def changing(draw):
    """Shares of 2 to 4 sources that rise, fall, stand still, begin late and are used up."""
    count, total = draw(st.integers(2, 4)), draw(st.integers(10, 3000))
    points = [sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True))) for _ in range(count)]
    levels = [[draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])) for _ in own] for own in points]
    weights = [lambda at, x=own, y=level: float(np.interp(at, x, y)) for own, level in zip(points, levels, strict=True)]
    limits = [draw(st.sampled_from([np.inf, np.inf, 7, total // 3 + 1])) for _ in range(count)]
    always = [lambda _: 0.1, *weights]
    return always, [np.inf, *limits], total


@settings(max_examples=30, deadline=None)
@given(changing(), st.data())
def test_any_stretch_is_that_of_reading_from_the_beginning_whatever_changes(shares, data):
    weights, limits, total = shares
    turns = apportion(weights, limits, total, changing=True)
    whole = turns.turns(0, total)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    for got, expected in zip(turns.turns(start, stop), whole, strict=True):
        np.testing.assert_array_equal(got, expected[start:stop])
    for source in range(turns.sources):
        own = whole[1][whole[0] == source]
        np.testing.assert_array_equal(own, np.arange(len(own)))


def test_a_share_that_stands_still_at_a_half_is_due_once():
    falls = Source("a", StandardLibrary(), weight=((0.5, 1.0), (0.5001, 0.0)))
    for total in (10, 14, 18, 2050):
        turns = apportion([lambda at: falls.weight_at(at, 1), lambda _: 1.0], [np.inf] * 2, total, changing=True)
        whole = turns.turns(0, total)
        parts = [turns.turns(at, at + 2) for at in range(0, total, 2)]
        for got, expected in zip(zip(*parts, strict=True), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(got), expected)


@given(WEIGHTS)
def test_every_source_has_its_share_at_any_time(weights):
    whose, _ = constant(weights).turns(0, 2000)
    taken = np.cumsum(whose[:, None] == np.arange(len(weights)), 0)
    due = np.arange(1, 2001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - due).max() <= (1 + len(weights)) / 2 + 1e-6


def test_a_longer_training_begins_with_the_same_examples():
    for got, expected in zip(
        constant([0.5, 0.5, 0.3], 777).turns(0, 700), constant([0.5, 0.5, 0.3], 10**7).turns(0, 700), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_what_is_used_up_leaves_its_share_to_the_others():
    turns = constant([0.5, 0.25, 0.25], 1000, [100, np.inf, np.inf])
    whose, which = turns.turns(0, 1000)
    assert np.bincount(whose).tolist() == [100, 450, 450]
    assert np.bincount(whose[:200]).tolist() == [100, 50, 50] and which[whose == 0].max() == 99
    with pytest.raises(ConfigError, match="are used up after 30 of 1,000 rows: allow more epochs"):
        constant([1.0, 1.0], 1000, [10, 20])
    with pytest.raises(ConfigError, match="have no weight at all at some time"):
        constant([0.0, 0.0])


def test_a_schedule_is_its_integral():
    rising = Source("a", StandardLibrary(), weight=((0.5, 0.0), (1.0, 1.0)))
    turns = apportion([lambda at: rising.weight_at(at, 1), lambda _: 1.0], [np.inf] * 2, 10_000, changing=True)
    whose, _ = turns.turns(0, 10_000)
    assert not (whose[:4990] == 0).any()
    at = np.linspace(0.5, 1, 100_001)
    share = (2 * at - 1) / (2 * at - 1 + 1)
    assert abs((whose == 0).sum() - 10_000 * np.trapezoid(share, at)) < 3


# ── of corpora ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, letter, size in (("a", "a", 4000), ("b", "b", 1000)):
        (folder / f"{name}.txt").write_text(letter * size)
    return {name: TextFiles(path=str(folder / f"{name}.txt")) for name in "ab"}


def mixture(texts, **of_a):
    return Mixture((Source("a", texts["a"], **{"weight": 3.0} | of_a), Source("b", texts["b"])))


def steps(corpus, cache, count, *, batch=4, seeds=(0,), **more):
    data = Data(corpus, sequence_length=16, batch_size=batch)
    rows = pipeline.rows_of(data, Bytes().fit(corpus, cache), "train", cache)
    source = pipeline.dispatches(data, rows, seeds=seeds, steps_per_item=1, steps=count, **more)
    feed = pipeline.feed(source)
    return [next(feed) for _ in range(count)], rows


def test_every_batch_has_every_source_and_every_epoch_every_row(texts, tmp_path):
    corpus = mixture(texts)
    batches, rows = steps(corpus, tmp_path, 200)
    letters = np.concatenate([batch.tokens[0, 0, :, 0] for batch in batches]).reshape(-1, 4)
    assert ((letters == ord("a")).sum(1) == 3).all() and ((letters == ord("b")).sum(1) == 1).all()
    assert [len(r) for r in rows] == [225, 56] and batches[0].tokens.shape == (1, 1, 4, 16)
    source = pipeline.dispatches(Data(corpus, 16, 4), rows, seeds=[7], steps_per_item=75, steps=1000)
    drawn = source[0].positions  # 225 of a, an epoch: each of its rows once
    assert drawn.shape == (1, 75, 4, 16)
    firsts = rows[0].gather(np.arange(225)).positions[:, 0]
    a = source[0].tokens[0, ..., 0] == ord("a")
    assert sorted(drawn[0][a][:, 0].tolist()) == sorted(firsts.tolist())


def test_members_of_a_population_see_what_they_see_alone(texts, tmp_path):
    together, _ = steps(mixture(texts), tmp_path, 5, seeds=(3, 4))
    alone, _ = steps(mixture(texts), tmp_path, 5, seeds=(4,))
    for both, one in zip(together, alone, strict=True):
        for name in ("tokens", "targets", "weights", "segments", "positions"):
            np.testing.assert_array_equal(getattr(both, name)[1:], getattr(one, name))


def test_epochs_end(texts, tmp_path):
    batches, rows = steps(mixture(texts, epochs=0.5), tmp_path, 100)
    letters = np.stack([batch.tokens[0, 0, :, 0] for batch in batches])
    assert (letters == ord("a")).sum() == len(rows[0]) // 2
    with pytest.raises(ConfigError, match="the mixture's sources are used up after 168 of 400 rows"):
        steps(Mixture((Source("a", texts["a"], epochs=0.5), Source("b", texts["b"], epochs=1))), tmp_path, 100)


def test_the_first_rows_alone_are_trained_on_and_all_is_scored(texts, tmp_path):
    corpus = Mixture((Source("a", texts["a"], rows=10), Source("b", texts["b"], rows=10_000)))
    batches, rows = steps(corpus, tmp_path, 60, batch=1)
    assert [len(r) for r in rows] == [10, 56]
    drawn = shuffled(np.arange(30), len(rows[0]), 0)  # of a, which has every other turn
    expected = [rows[0].gather(drawn[at : at + 1]).tokens for at in range(30)]
    np.testing.assert_array_equal(np.stack([b.tokens[0, 0] for b in batches[::2]]), expected)
    assert sorted(drawn.tolist()) == sorted(3 * list(range(10)))
    valid = pipeline.rows_of(Data(corpus, sequence_length=16), Bytes().fit(None, ""), "valid", tmp_path)
    whole = pipeline.rows_of(Data(texts["a"], sequence_length=16), Bytes().fit(None, ""), "valid", tmp_path)
    assert len(valid[0]) == len(whole[0]) > 10


def test_it_is_not_prepared_as_one(texts, tmp_path):
    with pytest.raises(ConfigError, match="is Mixture, whose sources are prepared one by one"):
        prepare(mixture(texts), Bytes(), tmp_path / "tokens", cache=tmp_path)
    tasks = Mixture((Source("facts", Recall(length=50, distances=(4,), rows=2000)), Source("b", texts["b"])))
    assert SentencePiece(vocabulary=340).fit(tasks, tmp_path).vocabulary == 340  # a corpus that makes its documents itself


def test_evaluation_has_as_much_of_each_source(texts, tmp_path):
    corpus, fitted = mixture(texts), Bytes().fit(None, "")
    data = Data(corpus, sequence_length=16, batch_size=4)
    given = {"batch": 4, "byte_lengths": fitted.byte_lengths, "limit_bytes": 160}
    valid = pipeline.evaluation_batches(pipeline.rows_of(data, fitted, "valid", tmp_path), **given)
    scored = valid.targets[valid.weights > 0]
    assert (scored == ord("a")).sum() == (scored == ord("b")).sum() == 80
    assert corpus.probes == ("a", "b")
    own = pipeline.evaluation_batches(pipeline.rows_of(data, fitted, "b", tmp_path), **given)
    assert set(own.targets[own.weights > 0].tolist()) == {ord("b")}
    inner = Mixture((Source("facts", Recall(length=50, distances=(4,))), Source("b", texts["b"])))
    assert inner.probes == ("facts", "b", "facts.4-facts") and inner.members("facts.4-facts")[0].split == "4-facts"
    assert sum(len(d) for d in corpus.documents("train")) == 3600 + 900  # what a tokenizer is trained on


def test_it_is_written_and_read_like_any_component(texts):
    corpus = mixture(texts, weight=((0.0, 1.0), (1.0, 2.0)), epochs=2.0)
    assert from_json(to_json(corpus), Corpus) == corpus
    written = "Mixture((Source('all', StandardLibrary(), weight=((0, 1), (0.5, 2)), epochs=3), Source('b', Recall())))"
    assert parse(written, Corpus, "data.corpus").sources[0].weight == ((0, 1), (0.5, 2))
    assert corpus.fingerprint() != mixture({"a": texts["b"], "b": texts["a"]}).fingerprint()


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Mixture(), "sources are missing: give at least one Source(name, corpus)"),
        (lambda: Mixture((Source("a", Recall()), Source("a", Recall()))), "sources must have names of their own, got a, a"),
        (lambda: Mixture((Source("a", Recall()), Source("b", Recall(), weight=None))), "must all have a weight, or none"),
        (lambda: Mixture((Source("a", Mixture((Source("b", Recall()),))),)), "has a mixture in it"),
        (lambda: Source("valid", Recall()), "name is what scores are called by: call it otherwise than 'valid'"),
        (lambda: Source("2x", Recall()), "call it otherwise than '2x'"),
        (lambda: Source("a", Recall(), rows=0), "rows must be > 0, got 0"),
        (lambda: Source("a.b", Recall()), "name must be a name without / @ . and :, got 'a.b'"),
        (lambda: Source("a", Recall(), weight=-1.0), "weight must be >= 0, got -1.0"),
        (lambda: Source("a", Recall(), weight=((0.5, 1.0), (0.5, 2.0))), "rising fractions of training"),
        (lambda: Source("a", Recall(), weight=()), "weight has no points"),
        (lambda: Source("a", Recall(), epochs=0.0), "epochs must be > 0, got 0.0"),
    ],
)
def test_mistakes_are_sentences(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)
