"""Span corruption as it was published: how much, in what spans, and nothing of the text lost, in packed rows too."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import comb

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.models.encoder import Encoder
from llm_jax.objectives.denoising import UL2, SpanCorruption
from llm_jax.objectives.rows import documents
from llm_jax.objectives.spans import Denoiser, noise_mask
from llm_jax.train.check import compiled
from tests.objectives.posed import DECODER, PAIR, chi_squared, packed, pose, read, sequence, tokenizer, whole

FIRST, SENTINELS = 257, 100


def amounts(size, rate, mean_length):
    """As the published code has it, in plain Python."""
    noise = min(max(round(size * rate), 1), size - 1)
    return noise, max(round(noise / mean_length), 1)


def masks(size, noise, spans, *, draws, seed=0):
    """`[draws, size]`: so many masks of one document."""
    docs = documents(jax.tree.map(lambda x: x[0], whole(size)))
    one = lambda key: noise_mask(key, docs, np.array([noise]), np.array([spans]))  # noqa: E731
    return np.asarray(compiled(jax.vmap(one))(jax.random.split(jax.random.key(seed), draws)))


def lengths(mask) -> list[int]:
    """Of the spans of a mask, shown and hidden in turn."""
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    return np.diff([0, *edges, len(mask)]).tolist()


@pytest.mark.parametrize("rate, mean_length", [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 64.0), (0.3, 2.5)])
def test_as_many_tokens_and_spans_as_published(rate, mean_length):
    noise_N, spans_N = Denoiser(rate, mean_length).amounts(np.arange(600))
    assert (noise_N[0], noise_N[1]) == (spans_N[0], spans_N[1]) == (0, 0)
    for size in range(2, 600):
        assert (noise_N[size], spans_N[size]) == amounts(size, rate, mean_length), size
    assert abs(noise_N[-1] / 599 - rate) < 1e-3 and abs(noise_N[-1] / spans_N[-1] - mean_length) < 0.1 * mean_length


def test_every_mask_is_alike():
    """Of 9 tokens with 4 hidden in 2 spans there are C(3, 1) · C(4, 1) masks."""
    found = Counter(tuple(mask.tolist()) for mask in masks(9, 4, 2, draws=6000))
    possible = [
        np.repeat([False, True, False, True], [a, c, 5 - a, 4 - c]) for a, c in [(a, c) for a in range(1, 5) for c in range(1, 4)]
    ]
    assert set(found) == {tuple(mask.tolist()) for mask in possible}
    assert chi_squared(list(found.values()), [6000 / 12] * 12) > 1e-3


def test_the_lengths_of_spans_are_those_of_random_cuts():
    """The first of S parts of N things is k long with probability C(N - k - 1, S - 2) / C(N - 1, S - 1)."""
    noise, spans = amounts(256, 0.15, 3.0)
    drawn = masks(256, noise, spans, draws=3000)
    assert (drawn.sum(1) == noise).all() and not drawn[:, 0].any() and drawn[:, -1].all()
    every = [lengths(mask) for mask in drawn]
    assert {len(one) for one in every} == {2 * spans}
    assert {sum(one[1::2]) for one in every} == {noise}
    for total, part in ((256 - noise, 0), (noise, 1), (noise, 2 * spans - 1)):
        top = 12
        expected = np.array([comb(total - k - 1, spans - 2) / comb(total - 1, spans - 1) for k in range(1, top)])
        counts = np.bincount([min(one[part], top) for one in every], minlength=top + 1)[1:]
        assert chi_squared(counts, 3000 * np.append(expected, 1 - expected.sum())) > 1e-3


def answers(said, scored) -> list[list[int]]:
    """What stands after each sentinel; the last says nothing. All is asked for but the first sentinel."""
    assert scored == [False] + [True] * (len(said) - 1)
    places = [i for i, token in enumerate(said) if FIRST <= token < FIRST + SENTINELS]
    assert [said[i] for i in places] == list(range(FIRST, FIRST + len(places))) and places[0] == 0 and places[-1] == len(said) - 1
    return [said[a + 1 : b] for a, b in pairwise(places)]


def put_together(shown, spans) -> list[int]:
    text = []
    for token in shown:
        text += spans[token - FIRST] if FIRST <= token < FIRST + SENTINELS else [token]
    return text


def parts(posed, row, document, model):
    """What is shown of a document, and what is said."""
    ids, scored = sequence(posed, row, document)
    if model is PAIR:
        return read(posed, row, document), answers(ids, scored)
    begin = scored.index(True) - 1
    assert not any(scored[:begin])
    return ids[:begin], answers(ids[begin:], scored[begin:])


@pytest.mark.parametrize("model", [PAIR, DECODER], ids=["encoder-decoder", "decoder"])
@pytest.mark.parametrize("sizes", [(40,), (23, 9, 30)], ids=["whole", "packed"])
def test_nothing_of_a_document_is_lost(model, sizes):
    batch = packed(sizes, rows=4) if len(sizes) > 1 else whole(*sizes, rows=4)
    posed, ids = pose(SpanCorruption(), batch, model=model), np.asarray(batch.tokens)
    for row in range(4):
        start = 0
        for document, size in enumerate(sizes):
            shown, spans = parts(posed, row, document, model)
            noise, count = amounts(size, 0.15, 3.0)
            assert (sum(map(len, spans)), len(spans)) == (noise, count)
            assert put_together(shown, spans) == ids[row, start : start + size].tolist()
            start += size
    if len(sizes) == 1:  # nothing is padded where one document fills a row
        assert posed.segments is None and posed.positions is None and posed.input_segments is None
        assert posed.tokens.shape[1] == (noise + count if model is PAIR else sizes[0] + 2 * count)


def test_a_decoder_is_shown_what_is_not_asked_for():
    posed = pose(SpanCorruption(), packed((23, 9, 30)))
    for document in range(3):
        places = np.flatnonzero(posed.segments[0] == document)
        scored = sequence(posed, 0, document)[1]
        assert posed.prefix[0, places].tolist() == [not right for right in scored][: len(places)]
        assert posed.positions[0, places].tolist() == list(range(len(places)))
    assert not posed.prefix[0, posed.segments[0] < 0].any()


def test_documents_without_room_are_left_out_whole():
    sizes = (2, 3) * 20
    for model in (PAIR, DECODER):
        posed, ids = pose(SpanCorruption(), packed(sizes), model=model), np.asarray(packed(sizes).tokens)[0]
        kept = [document for document in range(len(sizes)) if sequence(posed, 0, document)[0]]
        assert 8 < len(kept) < len(sizes) and kept == list(range(len(kept)))
        for document in kept:
            begin = sum(sizes[:document])
            assert put_together(*parts(posed, 0, document, model)) == ids[begin : begin + sizes[document]].tolist()
        if model is PAIR:
            assert set(posed.input_segments[0].tolist()) == {-1, *kept}
        lost = sum(size for document, size in enumerate(sizes) if document not in kept)
        assert (posed.left_out.tolist(), posed.asked.tolist()) == ([lost], [sum(sizes)])


@pytest.mark.parametrize("objective", [SpanCorruption(documents=50), UL2(documents=50)], ids=["spans", "UL2"])
@pytest.mark.parametrize("model", [PAIR, DECODER], ids=["encoder-decoder", "decoder"])
def test_there_is_room_for_as_many_short_documents_as_are_said_to_come(objective, model):
    sizes = (2,) * 50
    assert objective.lengths(100, model=model, packed=False) == replace(objective, documents=1).lengths(
        100, model=model, packed=False
    )
    few = pose(replace(objective, documents=1), packed(sizes, rows=3), model=model)
    many = pose(objective, packed(sizes, rows=3), model=model)
    assert (few.left_out > 0).all() and (many.left_out == 0).all() and (many.asked == 100).all()
    for row in range(3):
        assert set(many.segments[row].tolist()) >= set(range(50))
    assert many.tokens.shape[1] == objective.lengths(100, model=model, packed=True)[0]


def test_padding_and_documents_without_weight_are_left_out():
    batch = packed((20, 12), rows=2)
    segments, weights = np.asarray(batch.segments).copy(), np.asarray(batch.weights).copy()
    segments[0, 20:], weights[1] = -1, 0
    posed = pose(SpanCorruption(), replace(batch, segments=segments, weights=weights), model=PAIR)
    assert set(posed.segments[0].tolist()) == {-1, 0} and put_together(*parts(posed, 0, 0, PAIR)) == batch.tokens[0, :20].tolist()
    assert set(posed.segments[1].tolist()) == {-1} and posed.weights[1].sum() == 0
    assert (posed.asked.tolist(), posed.left_out.tolist()) == ([20, 0], [0, 0]), "they are not without room"


def test_ul2_draws_its_denoisers_alike():
    posed = pose(UL2(), whole(64, rows=700), model=PAIR)
    objective, ids = UL2(), tokenizer(UL2()).specials
    kinds = Counter()
    for row in range(700):
        (mode, *shown), spans = parts(posed, row, 0, PAIR)
        kinds[mode, sum(map(len, spans)), len(spans)] += 1
        if mode == ids["[S]"]:
            assert shown[-1] == FIRST and len(spans) == 1 and len(spans[0]) == 16, "one span, at the end"
    expected = Counter((ids[f"[{d.mode}]"], *(int(x[64]) for x in d.amounts(np.arange(65)))) for d in objective.denoisers)
    assert set(kinds) == set(expected)
    assert chi_squared([kinds[kind] for kind in expected], [100 * n for n in expected.values()]) > 1e-3


# Tay et al. 2022, table 1: mode, rate, mean length of a span
PUBLISHED = [("R", 0.15, 3), ("R", 0.15, 8), ("S", 0.25, None), ("X", 0.5, 3), ("X", 0.5, 8), ("X", 0.15, 64), ("X", 0.5, 64)]


def test_ul2_hides_what_was_published():
    """In documents of 512, of which 140 are expected of each of the seven."""
    length, rows = 512, 980
    posed = pose(UL2(), whole(length, rows=rows), model=PAIR)
    modes = {ids: mode[1] for mode, ids in tokenizer(UL2()).specials.items() if mode in ("[R]", "[S]", "[X]")}
    hidden, lengths, kinds = [], {}, Counter()
    for row in range(rows):
        (mode, *_), spans = parts(posed, row, 0, PAIR)
        hidden.append(sum(map(len, spans)) / length)
        kind = modes[mode], round(hidden[-1], 2), len(spans)
        kinds[kind] += 1
        lengths.setdefault(kind, []).extend(map(len, spans))
    expected = {(mode, rate, max(round(rate * length / (mean or length)), 1)): mean for mode, rate, mean in PUBLISHED}
    assert set(kinds) == set(expected)
    assert chi_squared(list(kinds.values()), [rows / 7] * 7) > 1e-3
    for kind, mean in expected.items():  # a document has a whole number of spans
        assert np.mean(lengths[kind]) == pytest.approx(mean or 0.25 * length, rel=0.02 + 0.5 / kind[2] * (mean is not None)), kind
    found, wanted = (Counter(mode for mode, *_ in kinds.elements()), Counter(mode for mode, *_ in PUBLISHED))
    assert chi_squared([found[mode] for mode in wanted], [rows / 7 * n for n in wanted.values()]) > 1e-3
    rate = np.mean([rate for _, rate, _ in PUBLISHED])  # 0.314 of all tokens
    assert abs(np.mean(hidden) - rate) < 4 * np.std([rate for _, rate, _ in PUBLISHED]) / rows**0.5


def test_a_denoiser_is_drawn_as_often_as_its_share_says():
    often, seldom = Denoiser(0.15, 3.0, "R", share=0.8), Denoiser(0.25, None, "S", share=0.2)
    objective = UL2(denoisers=(seldom, often))
    posed = pose(objective, whole(32, rows=1000), model=PAIR)
    count = int((posed.inputs[:, 0] == tokenizer(objective).specials["[R]"]).sum())
    assert chi_squared([count, 1000 - count], [800, 200]) > 1e-3
    with pytest.raises(ConfigError, match="share must be > 0, got 0"):
        Denoiser(share=0.0)


def test_what_becomes_of_a_row_depends_on_its_key_alone():
    batch, objective = packed((20, 12), rows=4), UL2()
    tokens, keys_B = tokenizer(objective), jax.random.split(jax.random.key(3), 4)
    run = compiled(lambda batch, keys_B: objective.pose(batch, keys_B, model=PAIR, tokens=tokens))
    together = run(batch, keys_B)
    apart = [run(*jax.tree.map(lambda x, row=row: x[row : row + 1], (batch, keys_B))) for row in range(4)]
    for name, value in vars(together).items():
        if value is not None:
            np.testing.assert_array_equal(value, np.concatenate([getattr(one, name) for one in apart]))
    again = run(batch, jax.random.split(jax.random.key(4), 4))
    assert (again.tokens != together.tokens).any()


def test_too_few_sentinels_and_models_that_see_later_tokens():
    with pytest.raises(ConfigError, match=r"objective.sentinels must be at least 3 for rows of 40 tokens, got 2: raise it"):
        pose(SpanCorruption(sentinels=2), whole(40))
    with pytest.raises(ConfigError, match=r"model.attention lets a token see those it is to predict"):
        UL2().check(Encoder())
    wrong = ({"rate": 1.0}, r"rate must be in \(0, 1\)"), ({"mean_length": 0.5}, r"mean_length must be at least 1")
    for fields, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            SpanCorruption(**fields)
    with pytest.raises(ConfigError, match="denoisers is empty"):
        UL2(denoisers=())
    with pytest.raises(ConfigError, match="sentinels must be at least 2, got 1"):
        UL2(sentinels=1)
    with pytest.raises(ConfigError, match="documents must be > 0, got 0"):
        SpanCorruption(documents=0)
