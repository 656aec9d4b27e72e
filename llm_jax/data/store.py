"""Where tokens stand: all documents of a split one after another, in one file or in many that are read as one."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

OPEN = 256  # files mapped at a time: each takes a descriptor, of which a process may have 1,024


@dataclass(frozen=True)
class Tokens:
    """ids `[n]`; starts `[documents]` int64: where each document begins; end: the id after each, or None.

    identity: of its content, across processes. reopen: makes the same store from its files, in another process.
    """

    ids: np.ndarray | Joined
    starts: np.ndarray
    end: int | None
    split: str = "train"
    identity: str = ""
    reopen: functools.partial[Tokens] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self):
        if self.reopen is not None:
            return self.reopen.func, self.reopen.args
        return super().__reduce_ex__(2)

    def sizes(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """`[stop - first]` int64: the tokens of these documents, the ends included."""
        begins = np.asarray(self.starts[first:stop], np.int64)
        after = len(self) if stop is None or stop >= len(self.starts) else int(self.starts[stop])
        return np.diff(begins, append=after) if len(begins) else begins

    def windows(self, begins: np.ndarray, length: int) -> np.ndarray:
        """`[…, length]`: the `length` ids from each of `begins` `[…]` on."""
        return self.ids.windows(begins, length) if isinstance(self.ids, Joined) else _windows(self.ids, begins, length)

    def runs(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """`[Σ sizes]`: from each of `begins` `[n]` on so many ids as `sizes` `[n]` says, one run after another."""
        if isinstance(self.ids, Joined):
            return self.ids.runs(begins, sizes)
        parts = [self.ids[begin : begin + size] for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True)]
        return np.concatenate(parts) if parts else self.ids[:0]


def write_starts_header(file: IO[bytes], documents: int) -> None:
    """What int64 `[documents]` begins with as `numpy.load` reads it; as long for any number, so that it can be written again."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (documents,)})


class Joined:
    """Files of ids one after another as one array `[n]`, of which only what is asked for is read.

    It takes slices, windows and runs. files: (path, ids in it) of each; files without any are left out.
    """

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int]], dtype: Any):
        self.files, self.dtype = [(path, count) for path, count in files if count], np.dtype(dtype)
        self._ends = np.cumsum([0, *(count for _, count in self.files)])
        self._mapped = functools.lru_cache(OPEN)(self._map)

    def __reduce__(self):
        return Joined, (self.files, self.dtype)  # each process maps them for itself

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: slice) -> np.ndarray:
        start, stop, step = at.indices(len(self))
        return self.runs(np.array([start]), np.array([max(stop - start, 0)]))[::step]

    def windows(self, begins: np.ndarray, length: int) -> np.ndarray:
        """As `Tokens.windows`."""
        flat = np.ravel(begins)
        self._check(flat, length)
        found = np.empty((flat.size, length), self.dtype)
        first, last = (np.searchsorted(self._ends, at, side="right") - 1 for at in (flat, flat + max(length - 1, 0)))
        for number in np.unique(first[first == last]).tolist():
            inside = (first == number) & (last == number)
            found[inside] = _windows(self._mapped(number), flat[inside] - self._ends[number], length)
        crossing = first != last
        found[crossing] = self.runs(flat[crossing], np.full(crossing.sum(), length)).reshape(-1, length)
        return found.reshape(*np.shape(begins), length)

    def runs(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """As `Tokens.runs`."""
        self._check(begins, sizes)
        found, filled = np.empty(int(sizes.sum()), self.dtype), 0
        numbers = np.searchsorted(self._ends, begins, side="right") - 1
        for begin, size, number in zip(begins.tolist(), sizes.tolist(), numbers.tolist(), strict=True):
            while size:  # one that crosses the end of a file goes on in the next
                within = begin - int(self._ends[number])
                part = self._mapped(number)[within : within + size]
                found[filled : filled + len(part)] = part
                filled, begin, size, number = filled + len(part), begin + len(part), size - len(part), number + 1
        return found

    def _check(self, begins: np.ndarray, sizes: np.ndarray | int) -> None:
        if begins.size and np.any(sizes) and not (begins.min() >= 0 and (begins + sizes).max() <= len(self)):
            raise IndexError(f"ids must lie in 0 to {len(self)}, got {begins.min()} to {(begins + sizes).max()}")

    def _map(self, number: int) -> np.ndarray:
        path, count = self.files[number]
        return np.asarray(np.memmap(path, self.dtype, "r", shape=(count,)))  # the subclass makes every slice slower


def _windows(ids: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(ids, length)[begins]  # row by row: 5 times as fast as by single ids
