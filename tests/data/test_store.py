"""Tokens in many files are read as one array would be."""

import pickle

import numpy as np
import pytest

from llm_jax.data.store import Joined, Tokens


def test_many_files_are_read_as_one_array(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_jax.data.store.OPEN", 2)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 60_000, count).astype(np.uint16) for count in (5, 0, 1, 300, 0, 70, 0)]
    for number, array in enumerate(arrays):
        array.tofile(tmp_path / str(number))
    joined = Joined([(tmp_path / str(number), len(array)) for number, array in enumerate(arrays)], np.uint16)
    whole = np.concatenate(arrays)
    for one in (joined, pickle.loads(pickle.dumps(joined))):
        assert len(one) == len(whole)
        for at in (slice(None), slice(3, 310), slice(0, 0), slice(370, 900), slice(2, 300, 3)):
            np.testing.assert_array_equal(one[at], whole[at])
        for length in (1, 4, 100, len(whole)):
            begins = rng.integers(0, len(whole) - length + 1, (3, 7))
            expected = whole[begins[..., None] + np.arange(length)]
            np.testing.assert_array_equal(one.windows(begins, length), expected)
            np.testing.assert_array_equal(Tokens(whole, np.zeros(1), None).windows(begins, length), expected)
    for begin in (-1, len(whole) - 3):
        with pytest.raises(IndexError, match="must lie in 0 to 376"):
            joined.windows(np.array([0, begin]), 4)
