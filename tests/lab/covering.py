"""Rows that together hold every combination of a few levels: pairs, triples, of many factors, by a deterministic greedy search."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Row = tuple[int, ...]  # for each factor the number of its level
Items = tuple[tuple[int, int], ...]  # (factor, level), by factor


def covering(sizes: Sequence[int], compatible: Callable[[Items], bool], strength: int) -> list[Row]:
    """Rows in which every tuple of `strength` levels occurs whose pairs are all compatible (Cohen et al. 1997, AETG).

    sizes: levels of each factor. The first level of every factor must be compatible with all others, so that each tuple has a row.
    """
    fits = {pair for pair in _tuples(sizes, 2) if compatible(pair)}
    missing = dict.fromkeys(t for t in _tuples(sizes, strength) if all(pair in fits for pair in combinations(t, 2)))
    rows = []
    while missing:
        row = _filled(dict(next(iter(missing))), sizes, fits, missing, strength)
        for found in combinations(sorted(row.items()), strength):
            missing.pop(found, None)
        rows.append(tuple(row[factor] for factor in range(len(sizes))))
    return rows


def _tuples(sizes: Sequence[int], strength: int) -> list[Items]:
    return [
        tuple(zip(factors, levels, strict=True))
        for factors in combinations(range(len(sizes)), strength)
        for levels in product(*(range(sizes[factor]) for factor in factors))
    ]


def _filled(
    row: dict[int, int], sizes: Sequence[int], fits: set[Items], missing: Mapping[Items, None], strength: int
) -> dict[int, int]:
    """The row with a level for every factor, each the one that adds most of what is missing, the lowest of equals."""
    for factor in sorted(set(range(len(sizes))) - set(row), key=lambda f: -sizes[f]):
        others = [tuple(sorted(rest)) for rest in combinations(row.items(), strength - 1)]

        def gain(level: int, factor=factor, others=others) -> int:
            return sum(tuple(sorted((*rest, (factor, level)))) in missing for rest in others)

        free = [level for level in range(sizes[factor]) if all(_pair(item, (factor, level)) in fits for item in row.items())]
        assert free, f"factor {factor} has no level for {row}"
        row[factor] = max(free, key=lambda level: (gain(level), -level))
    return row


def _pair(a: tuple[int, int], b: tuple[int, int]) -> Items:
    return (a, b) if a < b else (b, a)
