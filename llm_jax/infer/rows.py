"""Token sequences of different lengths as arrays of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError, check_type, require

SMALLEST = 16  # tokens of a row, at least: shorter ones gain less than a program costs

Ids = Sequence[int] | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Sequences that begin at place 0; after its own length a row is padding. tokens `[B, L]`, length `[B]`, int32."""

    tokens: jax.Array
    length: jax.Array

    @property
    def real(self) -> jax.Array:
        """`[B, L]`: which places hold a token."""
        return jnp.arange(self.tokens.shape[1])[None] < self.length[:, None]


def owned(ids: list[int], vocabulary: int, source: str) -> list[int]:
    """A tokenizer's ids. Raises `ConfigError` for one that a model of so many has no row for: it would read nan."""
    if ids and max(ids) >= vocabulary:
        told = f"gives the id {max(ids)}, and {source or 'the model'} has only {vocabulary}: it is another's"
        raise ConfigError(told, "tokenizer")
    return ids


def alike(first: Ids, second: Ids) -> int:
    """How many ids both begin with."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def rounded(length: int, at_most: int | None = None) -> int:
    """The length that rows of `length` tokens are padded to: four lengths an octave, so that at most a quarter is padding."""
    step = max(SMALLEST, 1 << max((length - 1).bit_length() - 3, 0))
    longer = max(-(-length // step), 1) * step
    return longer if at_most is None else max(min(longer, at_most), length)


def rounded_count(rows: int) -> int:
    """The number of rows that so many are padded to: a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def pad(sequences: Sequence[Ids], length: int, count: int | None = None) -> Rows:
    """The sequences as `count` rows of `length` places (default: as many as there are); those beyond them are empty."""
    count = len(sequences) if count is None else count
    tokens_BL, length_B = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for row, ids in enumerate(sequences):
        tokens_BL[row, : len(ids)] = ids
        length_B[row] = len(ids)
    return Rows(tokens_BL, length_B)  # type: ignore[arg-type]


def batches(lengths: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """Indices of at most `size` rows whose lengths are padded alike: a row's shape does not depend on the others."""
    check_type(size, int, "batch_size")
    require(size > 0, "batch_size", f"must be > 0, got {size}")
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, each in enumerate(lengths):
        alike.setdefault(tuple(rounded(length) for length in each), []).append(number)
    return [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]
