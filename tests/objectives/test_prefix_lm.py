"""Prefix language modelling: the cut is anywhere alike, and both architectures are asked for the same tokens."""

import numpy as np

from llm_jax.objectives.prefix_lm import PrefixLM
from tests.objectives.posed import DECODER, PAIR, chi_squared, packed, pose, read, sequence, whole


def test_the_cut_is_anywhere_alike():
    posed = pose(PrefixLM(), whole(9, rows=2000))
    given = posed.prefix.sum(1)
    assert (posed.prefix == (np.arange(9) < given[:, None])).all()
    np.testing.assert_array_equal(posed.weights, np.arange(9) >= given[:, None] - 1)
    assert chi_squared(np.bincount(given, minlength=9)[1:], np.full(8, 250)) > 1e-3


def test_both_architectures_are_asked_for_the_same():
    sizes = (12, 1, 7)
    batch = packed(sizes, rows=6)
    one, two = pose(PrefixLM(), batch, model=DECODER), pose(PrefixLM(), batch, model=PAIR)
    ids = np.asarray(batch.tokens)
    for row in range(6):
        begin = 0
        for document, size in enumerate(sizes):
            places, text = slice(begin, begin + size), ids[row, begin : begin + size].tolist()
            given = int(one.prefix[row, places].sum())
            asked = one.weights[row, places][:-1]
            assert asked.tolist() == [place >= given - 1 for place in range(size - 1)]
            if size == 1:
                assert read(two, row, document) == [] and sequence(two, row, document)[0] == []
            else:
                assert read(two, row, document) == text[:given]
                assert sequence(two, row, document) == (text[given - 1 :], [False] + [True] * (size - given))
            begin += size
