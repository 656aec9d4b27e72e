"""Associative recall: every question has one right answer, told so many facts ago as its split says."""

from dataclasses import replace

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data import pipeline
from llm_jax.data.pipeline import Data
from llm_jax.data.tasks import Recall
from llm_jax.data.tokenizers import Bytes

TASK = Recall(length=50, rows=40, distances=(1, 4, 9))


def read(row: str) -> list[tuple[bool, str, str]]:
    """(asks, letter, digit) of every slot."""
    slots = [row[i : i + 3] for i in range(0, 3 * TASK.slots, 3)]
    assert all(mark in ":?" for mark, _, _ in slots) and not row[3 * TASK.slots :].strip()
    return [(mark == "?", letter, digit) for mark, letter, digit in slots]


@pytest.mark.parametrize("split", ["train", "valid", "1-facts", "4-facts", "9-facts"])
def test_what_is_asked_was_told_once_with_that_answer(split):
    found = []
    for row in TASK.documents(split):
        assert len(row) == TASK.length - 1
        told: dict[str, tuple[int, str]] = {}
        for place, (asks, letter, digit) in enumerate(read(row)):
            if asks:
                found.append(place - told[letter][0])
                assert digit == told[letter][1]
            else:
                assert letter not in told
                told[letter] = place, digit
    if split.endswith("facts"):
        assert set(found) == {int(split.split("-")[0])}
    else:
        assert min(found) == 1 and max(found) > 9 and 3 < len(found) / len(list(TASK.documents(split))) <= TASK.slots / 2


def test_splits_are_apart_and_the_seed_says_which_rows():
    rows = {split: list(TASK.documents(split)) for split in ("train", "valid", "4-facts")}
    assert len(set().union(*rows.values())) == sum(map(len, rows.values())) and len(rows["train"]) == 40
    assert list(TASK.documents("train")) == rows["train"] != list(replace(TASK, seed=1).documents("train"))
    assert TASK.fingerprint() != replace(TASK, seed=1).fingerprint()


def test_no_window_cuts_a_row(tmp_path):
    fitted = Bytes().fit(TASK, tmp_path)
    rows = pipeline.rows_of(Data(TASK, sequence_length=50, batch_size=4), fitted, "4-facts", tmp_path)
    batch = pipeline.evaluation_batches(rows, batch=4, byte_lengths=fitted.byte_lengths, limit_bytes=1000)
    for row, text in zip(batch.tokens.reshape(-1, 50), TASK.documents("4-facts"), strict=False):
        assert fitted.decode(row[:-1]) == text and row[-1] == fitted.end
    assert (np.asarray(batch.segments) == 0).all()


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Recall(length=160), "length must be > 6 and at most 156, three for each letter, got 160"),
        (lambda: Recall(length=20, distances=(6,)), "distances must be >= 1 and < 6, the facts that 20 tokens hold"),
        (
            lambda: Data(Recall(), sequence_length=64),
            "sequence_length must be data.corpus.length=128, so that no row is cut, got 64",
        ),
    ],
)
def test_mistakes_are_sentences(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)
