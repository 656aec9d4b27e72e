"""Fill in the middle: every document can be put together again, and is cut as published."""

from collections import Counter
from itertools import combinations_with_replacement

import numpy as np
import pytest
from scipy.stats import binomtest

from llm_jax.core.config import ConfigError
from llm_jax.objectives.infilling import FillInTheMiddle
from tests.objectives.posed import DECODER, PAIR, chi_squared, packed, pose, sequence, whole

PREFIX, SUFFIX, MIDDLE, END = range(257, 261)


def parts(ids):
    """What a document is made of: its order, prefix, middle and suffix; None: it is as it was."""
    if PREFIX not in ids:
        return None
    assert ids[0] == PREFIX and ids[-1] == END and sorted(i for i in ids if i > 256) == [PREFIX, SUFFIX, MIDDLE, END]
    second, third = ids.index(SUFFIX), ids.index(MIDDLE)
    assert second < third
    if second > 1:
        return "PSM", ids[1:second], ids[third + 1 : -1], ids[second + 1 : third]
    return "first", ids[third + 1 : -1], ids[second + 1 : third]


def test_documents_are_told_in_both_orders_and_nothing_is_lost():
    sizes = (23, 9, 30)
    batch = packed(sizes, rows=40)
    posed, ids = pose(FillInTheMiddle(), batch), np.asarray(batch.tokens)
    kinds = Counter()
    for row in range(40):
        begin = 0
        for document, size in enumerate(sizes):
            found, asked = sequence(posed, row, document)
            assert asked == [False] + [True] * (len(found) - 1), "every token is asked for"
            text, told = ids[row, begin : begin + size].tolist(), parts(found)
            kinds[told[0] if told else None] += 1
            if told is None:
                assert found == text
            elif told[0] == "PSM":
                assert told[1] + told[2] + told[3] == text
            else:  # without a prefix before <suffix>: the suffix comes first, or PSM with an empty prefix
                _, rest, suffix = told
                assert rest + suffix == text
            begin += size
    assert binomtest(kinds[None], 120, 0.5).pvalue > 1e-3 and min(kinds.values()) > 10


@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_the_two_cuts_are_anywhere_alike(suffix_first):
    """Each of two draws is one of the 6 places of a text of 5: of the 21 pairs those of two places come twice as often."""
    batch = whole(5, rows=4000)
    posed = pose(FillInTheMiddle(rate=1.0, suffix_first=suffix_first), batch)
    text, cuts = np.asarray(batch.tokens), Counter()
    rows = np.concatenate([posed.tokens, posed.targets[:, -1:]], 1)
    assert rows.shape == (4000, 9)
    for row, ids in zip(rows.tolist(), text.tolist(), strict=True):
        second, third = row.index(SUFFIX), row.index(MIDDLE)
        suffix = row[second + 1 : third]
        if suffix_first:
            assert second == 1 and row[third + 1 : -1] + suffix == ids
            cuts[5 - len(suffix)] += 1
        else:
            assert row[1:second] + row[third + 1 : -1] + suffix == ids
            cuts[second - 1, 5 - len(suffix)] += 1
    pairs = {pair: 1 if pair[0] == pair[1] else 2 for pair in combinations_with_replacement(range(6), 2)}
    expected = Counter()
    for pair, weight in pairs.items():
        expected[pair[1] if suffix_first else pair] += weight * 4000 / 36
    assert chi_squared([cuts[key] for key in expected], list(expected.values())) > 1e-3


def test_a_row_has_room_for_eight():
    sizes = (3,) * 20
    posed = pose(FillInTheMiddle(rate=1.0), packed(sizes))
    found = [sequence(posed, 0, document)[0] for document in range(20)]
    assert [parts(ids) is None for ids in found] == [False] * 8 + [True] * 12
    text = np.asarray(packed(sizes).tokens)[0].tolist()
    assert [i for ids in found[8:] for i in ids] == text[24:]


def test_what_it_is_not_for():
    with pytest.raises(ConfigError, match=r"objective has no input for an encoder"):
        FillInTheMiddle().check(PAIR)
    with pytest.raises(ConfigError, match=r"rate must be in \[0, 1\], got 2"):
        FillInTheMiddle(rate=2.0)
    FillInTheMiddle().check(DECODER)
