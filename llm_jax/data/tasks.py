"""Synthetic tasks: text made for one question, as a corpus that every tokenizer, objective and report takes."""

from __future__ import annotations

import functools
import hashlib
import string
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import fingerprint, require, require_positive
from llm_jax.data.corpus import Corpus

KEYS = np.array(list(string.ascii_letters))
TELL, ASK = ":", "?"
SCORED = 512  # rows of every split but the one that is trained on


@dataclass(frozen=True)
class Recall(Corpus):
    """Associative recall (Ba et al. 2016; Arora et al. 2024, "Zoology"): rows of facts, and questions about earlier ones.

    A row is made of slots: ":K3" tells a fact, each of another letter with a random digit, and "?K3" asks for the digit that K was
    told with. Half of the slots, at most, are questions. Training asks of facts 1, 2, … slots back, log-uniformly; the `distances`
    are scored apart: "valid@8-facts" asks only of what was told 8 slots earlier. Chance is 1 in 10. With `Bytes` and
    `NextToken(after=ord("?"), skip=1)` only the answers count. length: tokens of a row, its end included, and so
    `data.sequence_length`; rows: how many there are to train on; seed: which.
    """

    length: int = 128
    rows: int = 16_384
    distances: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seed: int = 0

    def validate(self):
        require_positive(self, "length", "rows")
        most = 3 * len(KEYS)
        require(6 < self.length <= most, "length", f"must be > 6 and at most {most}, three for each letter, got {self.length}")
        inside = all(1 <= distance < self.slots for distance in self.distances)
        require(inside, "distances", f"must be >= 1 and < {self.slots}, the facts that {self.length} tokens hold")

    @property
    def slots(self) -> int:
        """Facts and questions of a row."""
        return (self.length - 1) // 3

    @property
    def probes(self):
        return tuple(f"{distance}-facts" for distance in self.distances)

    def check(self, sequence_length):
        sentence = f"must be data.corpus.length={self.length}, so that no row is cut, got {sequence_length}"
        require(sequence_length == self.length, "sequence_length", sentence)

    def named(self):
        for number, text in enumerate(self.documents("train")):
            yield str(number), text

    def part(self, name, text, split):
        raise NotImplementedError("splits are made, not cut")

    def documents(self, split):
        self.require_split(split)
        digest = hashlib.sha256(f"{self.seed} {split}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        distance = int(split.split("-")[0]) if split in self.probes else None
        for _ in range(self.rows if split == "train" else SCORED):
            yield self._row(rng, distance)

    def fingerprint(self, cache=None):
        return _content(self)

    def _row(self, rng: np.random.Generator, distance: int | None) -> str:
        asked = np.full(self.slots, -1)  # slot → the slot that it asks about; -1: it tells
        told: set[int] = set()  # slots that are asked about
        far = np.exp(rng.uniform(0, np.log(self.slots), self.slots)).astype(int) if distance is None else [distance] * self.slots
        for slot, back in zip(rng.permutation(self.slots).tolist(), far, strict=True):
            of = slot - int(back)
            if of >= 0 and slot not in told and of not in told and asked[of] < 0 and 2 * len(told) < self.slots:
                asked[slot] = of
                told.add(of)
        letters, digits = rng.permutation(KEYS)[: self.slots], rng.integers(0, 10, self.slots)
        source = np.where(asked < 0, np.arange(self.slots), asked)
        marks = np.where(asked < 0, TELL, ASK)
        row = "".join(f"{mark}{letters[of]}{digits[of]}" for of, mark in zip(source, marks, strict=True))
        return row.ljust(self.length - 1)


@functools.cache
def _content(task: Recall) -> str:
    return fingerprint([task.length, task.seed, *task.documents("valid")])
