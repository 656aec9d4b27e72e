"""An n-gram model of token ids, without a setting to tune: what a tokenizer's ids cost before any network is trained.

Interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999), with one discount for each length, D = n1 / (n1 + 2 n2)
where n1 and n2 n-grams have the counts 1 and 2 (Ney, Essen & Kneser 1994):

    P(w | h) = max(c(hw) - D, 0) / c(h·) + D · N(h·) / c(h·) · P(w | h without its first id)

c counts the longest n-grams, and for the others the ids that were seen before them; N(h·) is the number of ids seen after h, and
the recursion ends in 1 / symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Length:
    """The n-grams of one length. histories, grams: sorted codes; counts: of each n-gram; totals, distinct: c(h·) and N(h·)."""

    histories: np.ndarray
    grams: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray
    discount: float


@dataclass(frozen=True)
class NGram:
    """What `fit` makes of ids below `symbols`; histories of up to `order` - 1 ids go on over the ends of documents."""

    symbols: int
    order: int
    lengths: tuple[_Length, ...]

    def log2(self, ids: np.ndarray) -> np.ndarray:
        """`[n]` float64: log2 P of each id after those before it."""
        text, last = _padded(ids, self.symbols, self.order)
        found = np.full(len(last), 1 / self.symbols)
        history = np.zeros(len(last), np.int64)
        for before, length in enumerate(self.lengths):
            if before:
                history = _place(length.histories, _code(history, text[last - before], self.symbols))
            gram = _place(length.grams, _code(history, text[last], self.symbols))
            count = np.where(gram >= 0, length.counts[gram], 0)
            total = np.where(history >= 0, length.totals[history], 0)
            rest = length.discount * length.distinct[history] * found
            found = np.where(total > 0, (np.maximum(count - length.discount, 0) + rest) / np.maximum(total, 1), found)
        return np.log2(found)


def fit(ids: np.ndarray, symbols: int, *, order: int = 5) -> NGram:
    """The model of ids `[n]`, each below `symbols`."""
    text, last = _padded(ids, symbols, order)
    history, histories = np.zeros(len(last), np.int64), np.zeros(1, np.int64)
    known: list[list[np.ndarray]] = []
    for before in range(order):
        if before:
            histories, history = np.unique(_code(history, text[last - before], symbols), return_inverse=True)
        grams, first, which, counts = np.unique(
            _code(history, text[last], symbols), return_index=True, return_inverse=True, return_counts=True
        )
        if known:  # of the shorter n-grams, the ids before them are counted
            *_, shorter = known[-1]
            known[-1][2] = np.bincount(shorter[first])
        known.append([histories, grams, counts, which])
    return NGram(symbols, order, tuple(_length(h, g, c, symbols) for h, g, c, _ in known))


def _length(histories: np.ndarray, grams: np.ndarray, counts: np.ndarray, symbols: int) -> _Length:
    of = grams // (symbols + 1)
    once, twice = (max(int((counts == times).sum()), 1) for times in (1, 2))  # at least one: nothing is impossible
    totals, distinct = np.bincount(of, counts, minlength=len(histories)), np.bincount(of, minlength=len(histories))
    return _Length(histories, grams, counts, totals, distinct, once / (once + 2 * twice))


def _padded(ids: np.ndarray, symbols: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids after what stands for the beginning, and the places of the ids in it."""
    text = np.concatenate([np.full(order - 1, symbols, np.int64), np.asarray(ids, np.int64)])
    return text, np.arange(order - 1, len(text))


def _code(history: np.ndarray, ids: np.ndarray, symbols: int) -> np.ndarray:
    return history * (symbols + 1) + ids


def _place(codes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted number is in sorted codes; -1 for one that is not, as every number that comes of -1 is."""
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.where(codes[place] == wanted, place, -1)
