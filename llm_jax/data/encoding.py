"""Many texts into ids: in batches, whose size bounds what is in memory, and in threads; each text's ids are what they are alone."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

BATCH = 1 << 16  # characters encoded at a time; libraries keep 100 bytes and more for each id meanwhile
EACH = 16  # characters that a text counts besides its own, so that there are not endlessly many in a batch

Part = str | np.ndarray  # text, or ids that stand in its place


def encode_all(
    texts: Iterable[str],
    parts: Callable[[str], Sequence[Part]],
    encode: Callable[[Sequence[str]], Sequence[np.ndarray]],
    threads: int,
) -> Iterator[np.ndarray]:
    """The ids `[n]` of each text, in order: those of its parts (one or more) one after another.

    encode: gives the ids of each of a batch of texts, and is called by so many threads at a time, which helps where a library lets
    go of Python's lock. At most `threads` + 1 batches are read ahead.
    """
    counts: deque[int] = deque()

    def of_all() -> Iterator[Part]:
        for text in texts:
            found = parts(text)
            counts.append(len(found))
            yield from found

    def encoded(batch: Sequence[Part]) -> list[np.ndarray]:
        ids = iter(encode([part for part in batch if isinstance(part, str)]))
        return [next(ids) if isinstance(part, str) else part for part in batch]

    found = (ids for batch in _mapped(encoded, _batches(of_all()), threads) for ids in batch)
    for first in found:
        rest = list(islice(found, counts.popleft() - 1))
        yield np.concatenate([first, *rest]) if rest else first


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part) + EACH
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _mapped(
    function: Callable[[list[Part]], list[np.ndarray]], items: Iterable[list[Part]], threads: int
) -> Iterator[list[np.ndarray]]:
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        left = iter(items)
        running = deque(pool.submit(function, item) for item in islice(left, threads + 1))
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(function, item) for item in islice(left, 1))
            yield done


# ── a text in parts ──────────────────────────────────────────────────────────────────────────────────────────────────
AFTER_WORDS = re.compile(r"(?<=[^\s\u180e])(?=[ \n])")
AT_LINES = re.compile("(?=\n)")


@dataclass(frozen=True)
class Cut:
    """Parts of about `size` characters, each of which but the first begins at a place that the pattern finds."""

    where: re.Pattern[str]
    size: int

    def __call__(self, text: str) -> list[str]:
        found, start = [], 0
        while len(text) - start > self.size and (place := self.where.search(text, start + self.size)) is not None:
            found.append(text[start : place.start()])
            start = place.start()
        return [*found, text[start:]]


def replaced(text: str, mark: str, ids: np.ndarray) -> list[Part]:
    """A text with ids in place of each `mark`."""
    first, *rest = text.split(mark)
    return [first, *(part for piece in rest for part in (ids, piece))]
