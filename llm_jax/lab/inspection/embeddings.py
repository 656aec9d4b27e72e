"""The table of token embeddings: nearest neighbours, analogies, how evenly it fills its space, and all of it while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llm_jax.core.config import require


class Near(NamedTuple):
    """The likeliest first. ids, cosines `[..., k]`."""

    ids: np.ndarray
    cosines: np.ndarray


class Isotropy(NamedTuple):
    """How evenly the rows of a table point in all directions.

    partition: min Z(c) / max Z(c) with Z(c) = Σ_w exp(c·v_w), over unit vectors c along and against the eigenvectors of Σ v vᵀ;
    1 is even (Mu & Viswanath 2018, eq. 5). cosine: the average between two different rows, 0 is even (Ethayarajh 2019). rank: of
    how many equal directions the squares would have the same entropy (Roy & Vetterli 2007), at most D. norm: mean length of a row.
    """

    partition: float
    cosine: float
    rank: float
    norm: float


@dataclass(frozen=True)
class History:
    """The table at the steps of some checkpoints, an entry each.

    kept: mean cosine of a row with itself at the last step. neighbours: id → those at each step. ranks: analogy (a, b, c, d) → how
    many ids answer it better than d at each step.
    """

    steps: tuple[int, ...]
    isotropy: tuple[Isotropy, ...]
    kept: np.ndarray
    neighbours: Mapping[int, tuple[Near, ...]]
    ranks: Mapping[tuple[int, int, int, int], np.ndarray]


def neighbours(table_VD: np.ndarray, ids: Sequence[int], *, count: int = 8) -> Near:
    """`[n, k]`: the ids whose rows have the largest cosine with the rows of `ids`, without these themselves."""
    unit_VD = _unit(table_VD)
    ids = _known(unit_VD, ids)
    cosine_nV = unit_VD[ids] @ unit_VD.T
    cosine_nV[np.arange(len(ids)), ids] = -np.inf
    return _best(cosine_nV, min(count, len(unit_VD) - 1))


def analogy(table_VD: np.ndarray, a: int, b: int, c: int, *, count: int = 8) -> Near:
    """`[k]`: what is to c as b is to a: the largest cosines with b - a + c of unit rows, without the three (Mikolov et al. 2013).

    3CosAdd in the words of Levy & Goldberg 2014.
    """
    score_V = _analogy_scores(_unit(table_VD), a, b, c)
    return _best(score_V, min(count, int(np.isfinite(score_V).sum())))


def analogy_rank(table_VD: np.ndarray, a: int, b: int, c: int, d: int) -> int:
    """How many ids answer a : b :: c : ? better than d does; the three do not count."""
    require(d not in (a, b, c), "analogy", f"asks for one of its own words, {d}, which never is the answer: name another")
    score_V = _analogy_scores(_unit(table_VD), a, b, c)
    return int((score_V > score_V[d]).sum())


def isotropy(table_VD: np.ndarray) -> Isotropy:
    """Of all rows that are not zero."""
    v_VD = np.asarray(table_VD, np.float64)
    v_VD = v_VD[np.linalg.norm(v_VD, axis=-1) > 0]
    require(len(v_VD) > 1, "table", f"has {len(v_VD)} rows that are not zero: isotropy is of at least two")
    values_D, vectors_DD = np.linalg.eigh(v_VD.T @ v_VD)
    along_VD = v_VD @ vectors_DD
    log_z = np.concatenate([_logsumexp(along_VD), _logsumexp(-along_VD)])
    total = np.linalg.norm(_unit(v_VD).sum(0)) ** 2
    share_D = np.clip(values_D, 0, None) / values_D.sum()
    entropy = -(share_D * np.log(np.where(share_D > 0, share_D, 1))).sum()
    pairs = len(v_VD) * (len(v_VD) - 1)
    mean_norm = np.linalg.norm(v_VD, axis=-1).mean()
    return Isotropy(
        float(np.exp(log_z.min() - log_z.max())), float((total - len(v_VD)) / pairs), float(np.exp(entropy)), float(mean_norm)
    )


def spectrum(table_VD: np.ndarray) -> np.ndarray:
    """`[min(V, D)]`: the share of the variance about the mean row that each principal direction has, the largest first."""
    v_VD = np.asarray(table_VD, np.float64)
    centred_VD = v_VD - v_VD.mean(0)
    # the eigenvalues are the squares of the singular values, at a fraction of the time for a large vocabulary
    squares = np.clip(np.linalg.eigvalsh(centred_VD.T @ centred_VD)[::-1][: min(v_VD.shape)], 0, None)
    return squares / max(squares.sum(), 1e-300)


def history(
    tables: Iterable[tuple[int, np.ndarray]],
    *,
    words: Sequence[int] = (),
    analogies: Sequence[tuple[int, int, int, int]] = (),
    count: int = 5,
) -> History:
    """Of (step, table `[V, D]`) in the order of steps; one table at a time is held besides its unit rows."""
    steps, even, near, rank, units = [], [], [], [], []
    for step, table_VD in tables:
        steps.append(step)
        even.append(isotropy(table_VD))
        found = neighbours(table_VD, words, count=count)
        near.append([Near(*row) for row in zip(*found, strict=True)])
        rank.append([analogy_rank(table_VD, *given) for given in analogies])
        units.append(_unit(table_VD).astype(np.float32))
    require(bool(steps), "checkpoints", "are none: there is no history of a model without them")
    kept = np.array([(unit * units[-1]).sum(-1).mean() for unit in units])
    by_word = {word: tuple(row[i] for row in near) for i, word in enumerate(words)}
    return History(
        tuple(steps), tuple(even), kept, by_word, {given: np.array([row[i] for row in rank]) for i, given in enumerate(analogies)}
    )


def _analogy_scores(unit_VD: np.ndarray, a: int, b: int, c: int) -> np.ndarray:
    _known(unit_VD, (a, b, c))
    wanted_D = unit_VD[b] - unit_VD[a] + unit_VD[c]
    score_V = unit_VD @ (wanted_D / max(np.linalg.norm(wanted_D), 1e-30))
    score_V[[a, b, c]] = -np.inf
    return score_V


def _unit(table_VD: np.ndarray) -> np.ndarray:
    """Rows of length 1; a zero row stays zero."""
    v_VD = np.asarray(table_VD, np.float64)
    return v_VD / np.maximum(np.linalg.norm(v_VD, axis=-1, keepdims=True), 1e-30)


def _known(table_VD: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    found = np.asarray(ids, np.int64).reshape(-1)
    wrong = next((int(i) for i in found if not 0 <= i < len(table_VD)), None)
    require(wrong is None, "a token id", f"is {wrong}, but there are only 0 … {len(table_VD) - 1}")
    return found


def _best(score_nV: np.ndarray, count: int) -> Near:
    order = np.argsort(-score_nV, axis=-1, kind="stable")[..., :count]
    return Near(order, np.take_along_axis(score_nV, order, -1))


def _logsumexp(x_VD: np.ndarray) -> np.ndarray:
    top_D = x_VD.max(0)
    return top_D + np.log(np.exp(x_VD - top_D).sum(0))
