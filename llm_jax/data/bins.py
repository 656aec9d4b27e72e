"""Where documents go by their sizes alone: the first row that has room, or rows of their own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Stretches of a token store that stay together: where each begins, its size, and its row, from 0; all `[n]` int64."""

    begins: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray


def one_a_row(begins: np.ndarray, sizes: np.ndarray, length: int) -> Pieces:
    """Every document in rows of its own."""
    number, of, place = ranges(np.zeros(len(sizes), np.int64), -(-sizes // length))
    piece_begins = begins[of] + place * length
    return Pieces(piece_begins, np.minimum(begins[of] + sizes[of] - piece_begins, length), np.arange(len(number)))


def packed_first_fit(begins: np.ndarray, sizes: np.ndarray, length: int, together: int) -> Pieces:
    """Documents of `sizes` in rows of `length` tokens, first fit decreasing among every `together` of them; all int64 `[n]`."""
    whole = one_a_row(begins, sizes, length)
    full = whole.sizes == length
    document = np.searchsorted(begins, whole.begins, side="right") - 1
    rest, group = np.flatnonzero(~full), document[~full] // together
    order = np.lexsort((-whole.sizes[rest], group))  # by group, and in it the longest first
    rest, group = rest[order], group[order]
    groups, counts = np.unique(group, return_counts=True)
    table = np.zeros((len(groups), int(counts.max(initial=0))), np.int64)
    _, in_group, place = ranges(np.zeros(len(groups), np.int64), counts)
    table[in_group, place] = whole.sizes[rest]
    bins = first_fit(table, length)
    most = int(bins.max(initial=0)) + 1
    row = np.arange(len(whole.sizes))
    row[rest] = len(row) + in_group * most + bins[in_group, place]
    order = np.lexsort((whole.begins, row))
    _, first, row = np.unique(row[order], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)  # rows in the order of their first tokens, so that the first rows are a sample
    rank[np.argsort(whole.begins[order][first])] = np.arange(len(first))
    order = order[np.argsort(rank[row], kind="stable")]
    return Pieces(whole.begins[order], whole.sizes[order], np.sort(rank[row]))


def first_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """`[G, D]`: the first bin that has room for each of D things, one after another, in each of G groups at once.

    sizes `[G, D]`: at most `room`, the size of a bin; what has size 0 goes nowhere.
    """
    groups, things = sizes.shape
    bins = np.zeros((groups, things), np.int64)
    most = int(2 * sizes.sum(1).max(initial=0) // room) + 1  # any two bins together are more than full
    left = np.full((groups, most), room, np.int64)
    for thing in range(things):
        size = sizes[:, thing]
        bins[:, thing] = np.argmax(left >= size[:, None], 1)
        left[np.arange(groups), bins[:, thing]] -= size
    return bins


def ranges(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every member of the ranges from each of `begins` on, so long as `sizes` says: the number, its range, its place in it."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return begins[of] + place, of, place
