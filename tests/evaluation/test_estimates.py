"""Standard errors and intervals, against closed forms, numpy, and resampling."""

import math

import numpy as np
import pytest

from llm_jax.evaluation.estimates import Sums, proportion, reported


def test_a_proportion_has_the_error_of_its_mean_and_wilsons_interval():
    hits = [True] * 7 + [False] * 3
    found = proportion(hits)
    assert found.value == 0.7 and found.count == 10
    assert found.error == pytest.approx(np.std(hits, ddof=1) / math.sqrt(10))
    z, n, p = 1.959964, 10, 0.7  # Wilson 1927
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    sure = proportion([True] * 5)
    assert (sure.value, sure.error, sure.high) == (1, 0, 1) and 0.5 < sure.low < 0.6
    assert math.isnan(proportion([True]).error)


def test_what_another_library_reports_has_the_same_interval_where_it_is_a_proportion():
    mine = proportion([True, False, True, True])
    assert reported(mine.value, mine.error, 4) == mine
    other = reported(3.5, 0.5, 4)
    assert (other.low, other.high) == pytest.approx((3.5 - 0.98, 3.5 + 0.98), abs=1e-4)


def test_a_ratio_of_sums_and_its_error():
    draw = np.random.default_rng(0)
    under = draw.integers(5, 200, 400).astype(float)
    over = under * draw.gamma(9, 0.25, 400)
    sums = Sums(2)
    for pair in zip(over, under, strict=True):
        sums.add(pair)
    found = sums.ratio(0, 1)
    r = over.sum() / under.sum()
    np.testing.assert_allclose(sums.totals, [over.sum(), under.sum()], rtol=1e-12)
    assert found.value == pytest.approx(r, rel=1e-12)
    apart = over - r * under
    assert found.error == pytest.approx(math.sqrt(400 / 399 * (apart**2).sum()) / under.sum(), rel=1e-9)
    picks = draw.integers(0, 400, (4000, 400))
    assert found.error == pytest.approx((over[picks].sum(1) / under[picks].sum(1)).std(), rel=0.06)
    assert found.high - found.low == pytest.approx(2 * 1.966 * found.error, rel=1e-3)  # t with 399 degrees of freedom


def test_sums_of_far_numbers_that_hardly_differ_keep_their_digits():
    sums, values = Sums(2), 1e9 + np.arange(7.0)
    for value in values:
        sums.add((value, 1.0))
    assert sums.ratio(0, 1).error == pytest.approx(values.std(ddof=1) / math.sqrt(7), rel=1e-6)


def test_of_two_documents_the_interval_is_students_and_not_below_0():
    sums = Sums(2)
    for pair in ((4.0, 2.0), (3.0, 2.0)):
        sums.add(pair)
    found = sums.ratio(0, 1)
    half = math.tan(math.pi * 0.475) * 0.25  # the quantile of Student's t with one degree of freedom, which is Cauchy's
    assert (found.value, found.error) == (1.75, 0.25) and found.high == pytest.approx(1.75 + half)
    assert found.low == 0 and found.transformed(math.exp, 1.0).low == 1


def test_one_document_has_no_error():
    sums = Sums(2)
    sums.add((3.0, 2.0))
    found = sums.ratio(0, 1)
    assert found.value == 1.5 and math.isnan(found.error) and math.isnan(found.low)
    doubled = found.transformed(lambda x: 2 * x, 2)
    assert doubled.value == 3 and math.isnan(doubled.error)
