"""How documents become rows of a fixed length: cut where a row is full, or kept whole and packed, or one a row."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llm_jax.core.config import Config, fingerprint
from llm_jax.core.types import Batch
from llm_jax.core.whole import whole_folder
from llm_jax.data.first_fit import Pieces, one_a_row, packed_first_fit, ranges
from llm_jax.data.store import Tokens

TOGETHER = 64  # rows, about, that documents are packed into together: the last of them stays half empty
GROUPS, DOCUMENTS = 256, 1 << 20  # such groups that are packed at once, and documents in them, at most
PADDING = -1  # the segment of what fills a row up


class Rows:
    """The rows of a token store, by number, each `length` tokens."""

    def __init__(self, tokens: Tokens, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        raise NotImplementedError

    def gather(self, numbers: np.ndarray) -> Batch:
        """The rows with the given numbers `[…]` as a batch `[…, length]` of int32."""
        raise NotImplementedError

    def stretches(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of what a row is made: where each stretch of the token store begins, and its size, `[n]`."""
        raise NotImplementedError


class First(Rows):
    """The first `count` rows of others, or all where there are fewer."""

    def __init__(self, rows: Rows, count: int):
        super().__init__(rows.tokens, rows.length)
        self.rows, self.count = rows, min(count, len(rows))

    def __len__(self):
        return self.count

    def gather(self, numbers):
        return self.rows.gather(numbers)

    def stretches(self, number):
        return self.rows.stretches(number)


@dataclass(frozen=True)
class Packing(Config):
    """How documents become rows. All rows of a store have numbers, so that any order of them can be drawn."""

    abstract = True

    @property
    def segmented(self) -> bool:
        """Whether rows say which document each token is of."""
        return True

    def rows(self, tokens: Tokens, length: int, cache: str | os.PathLike) -> Rows:
        """The store in rows of `length` tokens; what had to be computed for it is kept in the `cache` folder."""
        raise NotImplementedError


# ── cut where a row is full ──────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ConcatThenSplit(Packing):
    """Documents one after another, cut into rows: no padding, and a document ends up in two rows where one is full.

    document_masks: attention, positions and loss stay within documents; without, they run across (Brown et al. 2020, §B).
    """

    document_masks: bool = True

    @property
    def segmented(self):
        return self.document_masks

    def rows(self, tokens, length, cache):
        return Windows(tokens, length, self.document_masks)


class Windows(Rows):
    """Row r is tokens r · length and on, and its targets the same one further."""

    def __init__(self, tokens: Tokens, length: int, document_masks: bool):
        super().__init__(tokens, length)
        self.document_masks = document_masks

    def __len__(self):
        return max(len(self.tokens) - 1, 0) // self.length

    def stretches(self, number):
        return np.array([number * self.length]), np.array([self.length])

    def gather(self, numbers):
        begins, starts = np.ravel(numbers).astype(np.int64) * self.length, self.tokens.starts
        ids = self.tokens.windows(begins, self.length + 1).astype(np.int32).reshape(*np.shape(numbers), self.length + 1)
        if not self.document_masks:
            return Batch(ids[..., :-1], ids[..., 1:])
        first, stop = (np.searchsorted(starts, at, side="right") for at in (begins, begins + self.length))
        document, row, _ = ranges(first, stop - first)
        place = starts[document] - begins[row]  # 1 to length
        weights = np.ones((len(begins), self.length), np.float32)
        weights[row, place - 1] = 0
        inner = place < self.length
        segments, positions = _counted(row[inner], place[inner], weights.shape)
        shape = (*np.shape(numbers), self.length)
        return Batch(ids[..., :-1], ids[..., 1:], *(array.reshape(shape) for array in (weights, segments, positions)))


# ── kept whole ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Whole(Packing):
    """Documents stay whole, but for those longer than a row. Attention, positions and loss stay within documents."""

    abstract = True

    def rows(self, tokens, length, cache):
        return _packed(self, tokens, length, os.fspath(cache))

    def pieces(self, begins: np.ndarray, sizes: np.ndarray, length: int, together: int) -> Pieces:
        """Documents of these begins and sizes `[n]` in rows; together: how many of them may be packed together."""
        raise NotImplementedError


@dataclass(frozen=True)
class FirstFit(Whole):
    """Each document goes into the first row that has room for it, the longest first; what is left is padding.

    That is first-fit decreasing, at most 11/9 of the fewest rows and a little (Johnson 1973), among neighbours of about 64 rows'
    tokens. One longer than a row fills rows, and its rest is packed like a document. Ding et al. 2024, "Fewer truncations improve
    language modeling", pack so, best fit.
    """

    def pieces(self, begins, sizes, length, together):
        return packed_first_fit(begins, sizes, length, together)


@dataclass(frozen=True)
class Padded(Whole):
    """A document a row, and padding after it; one longer than a row goes on in the next."""

    def pieces(self, begins, sizes, length, together):
        return one_a_row(begins, sizes, length)


class Plan(NamedTuple):
    """Row r is made of pieces first[r] to before first[r + 1]; all are mapped from files."""

    first: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray


class Packed(Rows):
    """Rows of pieces, as a plan says."""

    def __init__(self, tokens: Tokens, length: int, plan: Plan, reopen: functools.partial[Packed]):
        super().__init__(tokens, length)
        self.plan, self._reopen = plan, reopen

    def __reduce__(self):
        return self._reopen.func, self._reopen.args  # each process maps the files for itself

    def __len__(self):
        return len(self.plan.first) - 1

    def stretches(self, number):
        pieces = slice(int(self.plan.first[number]), int(self.plan.first[number + 1]))
        return np.asarray(self.plan.begins[pieces]), np.asarray(self.plan.sizes[pieces])

    def gather(self, numbers):
        flat = np.ravel(numbers)
        first, stop = self.plan.first[flat], self.plan.first[flat + 1]
        piece, row, within = ranges(first, stop - first)  # of each piece: its number, its row, its place among the row's
        begins, sizes = np.asarray(self.plan.begins[piece]), np.asarray(self.plan.sizes[piece])
        before = np.cumsum(sizes) - sizes
        before -= before[np.flatnonzero(within == 0)][row]  # tokens of the row before the piece
        shape = (len(flat), self.length)
        real = np.arange(self.length) < np.bincount(row, sizes, len(flat))[:, None]
        counted = _counted(row, before, shape)
        segments, positions = (np.where(real, found, filler) for found, filler in zip(counted, (PADDING, 0), strict=True))
        tokens, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), real.astype(np.float32)
        tokens[real] = self.tokens.runs(begins, sizes)  # pieces fill their rows from the left, one row after another
        targets[:, :-1] = tokens[:, 1:]
        goes_on, last = self._goes_on(begins + sizes), before + sizes - 1
        targets[row[goes_on], last[goes_on]] = self.tokens.windows((begins + sizes)[goes_on], 1)[:, 0]
        weights[row[~goes_on], last[~goes_on]] = 0
        return Batch(*(x.reshape(*np.shape(numbers), self.length) for x in (tokens, targets, weights, segments, positions)))

    def _goes_on(self, after: np.ndarray) -> np.ndarray:
        """Whether the token at each of these places belongs to the document of the one before it."""
        starts = self.tokens.starts
        next_start = np.searchsorted(starts, after)
        found = starts[np.minimum(next_start, len(starts) - 1)]
        return (after < len(self.tokens)) & (found != after)


def _counted(row: np.ndarray, place: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of segments and places within them, int32 `[R, L]`: segments begin where rows do and at these places of rows.

    Run by run: four times as quick as sums along rows.
    """
    rows, length = shape
    firsts = np.arange(rows) * length
    begins = np.union1d(firsts, row * length + place)
    sizes = np.diff(begins, append=rows * length)
    of = begins // length
    numbers = np.arange(len(begins)) - np.searchsorted(begins, firsts)[of]
    segments, starts = (np.repeat(each.astype(np.int32), sizes).reshape(shape) for each in (numbers, begins - firsts[of]))
    return segments, np.arange(length, dtype=np.int32) - starts


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _packed(packing: Whole, tokens: Tokens, length: int, cache: str) -> Packed:
    reopen = functools.partial(_packed, packing, tokens, length, cache)
    if not tokens.identity:
        columns = zip(*_columns(_planned(packing, tokens, length)), strict=True)
        return Packed(tokens, length, Plan(*map(np.concatenate, columns)), reopen)
    folder = pathlib.Path(cache) / "packed" / fingerprint([tokens.identity, packing, length])
    if not _is_whole(folder):
        _write(folder, _planned(packing, tokens, length))
    rows, pieces = json.loads((folder / "counts.json").read_text())
    mapped = lambda name, count: np.memmap(folder / name, np.int64, "r", shape=(count,)) if count else np.zeros(0, np.int64)  # noqa: E731
    plan = Plan(mapped("first", rows + 1), mapped("begins", pieces), mapped("sizes", pieces))
    return Packed(tokens, length, plan, reopen)


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether files are as long as they say."""
    try:
        rows, pieces = json.loads((folder / "counts.json").read_text())
        wanted = zip(Plan._fields, (rows + 1, pieces, pieces), strict=True)
        return all((folder / name).stat().st_size == count * np.dtype(np.int64).itemsize for name, count in wanted)
    except (OSError, ValueError):
        return False


def _planned(packing: Whole, tokens: Tokens, length: int) -> Iterator[Pieces]:
    """The pieces of a store in order, of some groups of documents at a time."""
    mean = max(len(tokens) / max(len(tokens.starts), 1), 1.0)
    together = max(int(TOGETHER * length / mean), 1)
    step = together * max(min(GROUPS, DOCUMENTS // together), 1)
    for at in range(0, len(tokens.starts), step):
        stop = min(at + step, len(tokens.starts))
        begins, sizes = np.asarray(tokens.starts[at:stop], np.int64), tokens.sizes(at, stop)
        yield packing.pieces(begins, sizes, length, together)


def _columns(parts: Iterator[Pieces]) -> Iterator[Plan]:
    """The plan of all parts, one stretch of each of its arrays after another."""
    pieces, none = 0, np.zeros(0, np.int64)
    yield Plan(np.zeros(1, np.int64), none, none)
    for part in parts:
        ends = np.flatnonzero(np.diff(part.rows, append=-1)) + 1  # of the pieces of each row
        yield Plan(pieces + ends, part.begins, part.sizes)
        pieces += len(part.rows)


def _write(folder: pathlib.Path, parts: Iterator[Pieces]) -> None:
    rows = pieces = 0
    with whole_folder(folder, stands=_is_whole) as to, contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(to / name, "wb")) for name in Plan._fields]
        for columns in _columns(parts):
            for file, values in zip(files, columns, strict=True):
                file.write(values.tobytes())
            rows, pieces = rows + len(columns.first), pieces + len(columns.begins)
        (to / "counts.json").write_text(json.dumps([rows - 1, pieces]))
