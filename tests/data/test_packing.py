"""Documents in rows: every token once, documents whole where they are to be, and rows as a loop over documents makes them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.apportion import apportion
from llm_jax.data.corpora import StandardLibrary
from llm_jax.data.first_fit import first_fit
from llm_jax.data.packing import PADDING, ConcatThenSplit, FirstFit, Padded
from llm_jax.data.pipeline import Dispatches
from llm_jax.data.store import Tokens
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizers import Bytes

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def store(sizes):
    """Documents of so many ids, no two of which are alike."""
    sizes = np.array(sizes, np.int64)
    return Tokens(np.arange(1, sizes.sum() + 1, dtype=np.int32), np.cumsum(sizes) - sizes, None)


def pieces(batch):
    """The (first token, size) of every segment of every row, in order."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for number in range(segments.max() + 1):
            inside = tokens[segments == number]
            np.testing.assert_array_equal(inside, np.arange(inside[0], inside[0] + len(inside)))
            found.append((inside[0], len(inside)))
    return found


def one_by_one(tokens, row):
    """What a row must be, from its pieces: (tokens, targets, weights, segments, positions) by a loop."""
    ends = {int(start) for start in tokens.starts} | {len(tokens)}
    said = {"tokens": [], "targets": [], "weights": [], "segments": [], "positions": []}
    for segment, (first, size) in enumerate(row):
        for place in range(size):
            at = first - 1 + place  # its place in the store
            said["tokens"].append(at + 1)
            said["segments"].append(segment)
            said["positions"].append(place)
            said["weights"].append(float(at + 1 not in ends))
            said["targets"].append(at + 2 if at + 1 not in ends else None)
    return said


@given(SIZES, st.integers(2, 24), st.sampled_from([FirstFit(), Padded()]))
def test_every_token_is_in_one_row_and_every_prediction_is_made_once(sizes, length, packing):
    tokens = store(sizes)
    rows = packing.rows(tokens, length, "")
    batch = rows.gather(np.arange(len(rows)))
    real = batch.segments != PADDING
    assert sorted(batch.tokens[real].tolist()) == list(range(1, len(tokens) + 1))
    assert batch.weights.sum() == sum(size - 1 for size in sizes)  # all but what follows a document's last token
    assert not batch.weights[~real].any() and not batch.tokens[~real].any() and not batch.positions[~real].any()
    begun = {int(start) + 1 for start in tokens.starts}
    for first, size in pieces(batch):  # cut only where it fills a row
        rest = next(start for start in sorted({*begun, len(tokens) + 1}) if start > first) - first
        assert size == min(rest, length)
    if isinstance(packing, Padded):
        assert batch.segments.max() == 0
    for one, (ids, segments) in enumerate(zip(batch.tokens, batch.segments, strict=True)):
        inside = [ids[segments == number] for number in range(segments.max() + 1)]
        for name, values in one_by_one(tokens, [(int(part[0]), len(part)) for part in inside]).items():
            for got, wanted in zip(getattr(batch, name)[one], values, strict=False):
                assert wanted is None or got == wanted


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50))
def test_first_fit_is_what_a_loop_over_bins_finds(sizes, room):
    left, expected = [], []
    for size in sizes:
        place = next((number for number, free in enumerate(left) if free >= size), None)
        if place is None:
            left.append(room)
            place = len(left) - 1
        left[place] -= size
        expected.append(place)
    padded = [*sizes, 0]  # a shorter group beside a longer one
    np.testing.assert_array_equal(first_fit(np.array([padded, padded[::-1]]), room)[0, :-1], expected)


def test_rows_are_nearly_full_and_begin_in_the_order_of_the_text():
    rng = np.random.default_rng(0)
    tokens = store(np.minimum(rng.lognormal(5, 1, 20_000).astype(int) + 1, 10_000))
    rows = FirstFit().rows(tokens, 1024, "")
    assert len(tokens) / (len(rows) * 1024) > 0.97
    sample = rows.gather(np.arange(0, len(rows), 50))
    firsts = sample.tokens.min(-1, where=sample.segments >= 0, initial=1 << 30)
    assert np.corrcoef(firsts, np.arange(len(firsts)))[0, 1] > 0.99  # so that the first rows of a split are a sample of its text


@pytest.mark.parametrize("packing", [ConcatThenSplit(), ConcatThenSplit(document_masks=False), FirstFit(), Padded()])
def test_rows_are_the_same_in_another_process_and_from_the_cache(packing, tmp_path):
    corpus = StandardLibrary(megabytes=0.3)
    tokens = tokenize(corpus, Bytes().fit(corpus, tmp_path), "test", tmp_path)
    memory = Tokens(tokens.ids[:], np.asarray(tokens.starts), tokens.end)
    numbers = np.array([[0, 5], [3, 2]])
    fresh = packing.rows(memory, 128, tmp_path).gather(numbers)
    rows = packing.rows(tokens, 128, tmp_path)
    for one in (rows, packing.rows(tokens, 128, tmp_path), pickle.loads(pickle.dumps(rows))):
        assert len(one) == len(packing.rows(memory, 128, tmp_path))
        for name in ("tokens", "targets", "weights", "segments", "positions"):
            np.testing.assert_array_equal(getattr(one.gather(numbers), name), getattr(fresh, name))
    assert len(pickle.dumps(rows)) < 2000  # names of files, not what is in them


@pytest.mark.parametrize("name", ["first", "begins", "sizes", "counts.json"])
def test_a_plan_that_is_not_whole_is_made_anew(name, tmp_path):
    tokens = replace(store([5, 9, 2, 7, 7]), identity="five")
    fresh = FirstFit().rows(tokens, 10, tmp_path).gather(np.arange(4))
    (file,) = (tmp_path / "packed").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-4])
    again = FirstFit().rows(tokens, 10, tmp_path).gather(np.arange(4))
    np.testing.assert_array_equal(again.tokens, fresh.tokens)


@pytest.mark.parametrize("packing", [ConcatThenSplit(), FirstFit(), Padded()], ids=lambda p: type(p).__name__)
def test_where_a_batch_comes_from_is_told_of_each_of_its_rows(packing):
    stores = [store([5, 30, 3, 14, 9, 2, 2, 25] * 5), store([11, 8] * 20)]
    rows = tuple(packing.rows(tokens, 12, "") for tokens in stores)
    turns = apportion([lambda _: 0.6, lambda _: 0.4], [np.inf] * 2, 1000, changing=False)
    fed = Dispatches(rows, turns, batch=6, seeds=(4, 9), steps=3)
    for step in range(6):
        for member, seed in enumerate(fed.seeds):
            batch = fed[step // 3].tokens[member, step % 3]
            for row, origin in zip(batch, fed.origins(step, seed), strict=True):
                tokens = stores[origin.source]
                np.testing.assert_array_equal(origin.ids, row[: len(origin.ids)])
                np.testing.assert_array_equal(rows[origin.source].gather(np.array([origin.row])).tokens[0], row)
                of = np.repeat(np.arange(len(tokens.starts)), tokens.sizes())[row[row > 0] - 1]  # ids are places, from 1
                assert list(origin.documents) == list(dict.fromkeys(of.tolist()))
