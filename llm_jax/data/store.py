"""Where tokens stand: one memory-mapped array, or many files that are read as one."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPEN = 256  # files mapped at a time: each takes a descriptor, of which a process may have 1,024


@dataclass(frozen=True)
class Tokens:
    """ids `[n]`, memory-mapped; starts `[documents]` int64: where each document begins; end: the id after each, or None."""

    ids: np.ndarray | Joined
    starts: np.ndarray
    end: int | None
    split: str = "train"

    def __len__(self) -> int:
        return len(self.ids)


class Joined:
    """Files of ids one after another as one array `[n]`, of which only what is asked for is read.

    It takes slices and arrays of indices `>= 0`. files: (path, ids in it) of each; files without any are left out.
    """

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int]], dtype: Any):
        self.files, self.dtype = [(path, count) for path, count in files if count], np.dtype(dtype)
        self._ends = np.cumsum([0, *(count for _, count in self.files)])
        self._mapped = functools.lru_cache(OPEN)(self._map)

    def __reduce__(self):
        return Joined, (self.files, self.dtype)  # each process maps them for itself

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        if isinstance(at, slice):
            at = np.arange(*at.indices(len(self)))
        flat = np.asarray(at).ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"indices must be >= 0 and < {len(self)}, got {flat.min()} to {flat.max()}")
        number = np.searchsorted(self._ends, flat, side="right") - 1
        order = np.argsort(number, kind="stable")
        found = np.empty(flat.shape, self.dtype)
        for of_one in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            if of_one.size:
                one = int(number[of_one[0]])
                found[of_one] = self._mapped(one)[flat[of_one] - self._ends[one]]
        return found.reshape(np.shape(at))

    def _map(self, number: int) -> np.ndarray:
        path, count = self.files[number]
        return np.memmap(path, self.dtype, "r", shape=(count,))
