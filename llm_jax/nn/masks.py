"""Which keys a query may see: masks as configurations, and where tokens stand.

To add a mask: a frozen dataclass below `Mask` with `visible`, with `span` where keys can be skipped, and a row in
`tests/nn/test_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive

Span = tuple[Any, Any]  # key indices [low, high), integers or arrays of them; None: no bound


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where tokens stand.

    index: place in the row, `[B or 1, L]`, by which causality and distances are counted; None is 0 … L-1, and lets every back end
    skip what a mask hides. segment: document number, `[B, L]`; attention stays inside a document, and a negative number is padding,
    which sees nothing and is seen by nobody. None belongs to every document. prefix: part of a prefix that is seen from everywhere
    in its document, `[B, L]` bool. position: place in the document, `[B or 1, L]`, rising within it, by which chunks and the first
    tokens are counted; None is the index.
    """

    index: jax.Array | None = None
    segment: jax.Array | None = None
    prefix: jax.Array | None = None
    position: jax.Array | None = None

    def written(self, length: int) -> jax.Array:
        """The index of `length` tokens, `[B or 1, L]`."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.index is None else self.index

    def in_document(self, length: int) -> jax.Array:
        """The position of `length` tokens, `[B or 1, L]`."""
        return self.written(length) if self.position is None else self.position

    def rows(self, start: int, stop: int) -> Places:
        """Those of the tokens [start, stop), with the index written out."""
        return self._of(slice(start, stop), jnp.arange(start, stop))

    def at(self, own: jax.Array) -> Places:
        """Those of the tokens with these numbers, `[l]`, with the index written out."""
        return self._of(own, own)

    def _of(self, own: Any, numbers: jax.Array) -> Places:
        index = numbers[None] if self.index is None else self.index[:, own]
        return Places(index, *(None if x is None else x[:, own] for x in (self.segment, self.prefix, self.position)))


@dataclass(frozen=True)
class Mask(Config):
    """Which keys a query may see, besides documents (`visible` below). Its methods take NumPy arrays too.

    causal: whether no token sees a later one, where no prefix is given.
    """

    abstract = True
    causal = True

    def visible(self, queries: Places, keys: Places) -> jax.Array | None:
        """`[B or 1, L, M]` bool, of places with their index written out; None: all."""
        return None

    def span(self, first: Any, last: Any, *, packed: bool = False) -> Span:
        """What queries with an index in [first, last] may see at most, apart from the `anchors`.

        packed: positions are not indices.
        """
        return None, None

    @property
    def anchors(self) -> int:
        """Keys with a position below it may be seen from anywhere in their document, whatever the span."""
        return 0

    @property
    def counts(self) -> bool:
        """Whether it asks for positions in the document, not for distances alone."""
        return self.anchors > 0


@dataclass(frozen=True)
class Bidirectional(Mask):
    """Every key."""

    causal = False


@dataclass(frozen=True)
class Causal(Mask):
    """Keys that stand no later than the query."""

    def visible(self, queries, keys):
        return _reached(queries, keys)

    def span(self, first, last, *, packed=False):
        return None, last + 1


@dataclass(frozen=True)
class Prefix(Mask):
    """Keys that stand no later than the query, and those of its document's prefix (Liu et al. 2018; Raffel et al. 2020, §3.2.1)."""

    def visible(self, queries, keys):
        causal = _reached(queries, keys)
        return causal if keys.prefix is None else causal | keys.prefix[:, None]


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """The `window` nearest keys up to the query and itself (Beltagy et al. 2020); if not causal, those less than `window` away.

    sinks: the first so many tokens of the document stay visible (StreamingLLM, Xiao et al. 2024).
    """

    window: int = 1024
    sinks: int = 0
    causal: bool = True

    def validate(self):
        require_positive(self, "window")
        require(self.sinks >= 0, "sinks", f"must be >= 0, got {self.sinks}")

    def visible(self, queries, keys):
        distance = _distance(queries, keys)
        near = (distance < self.window) & (distance > -self.window)
        if self.sinks:
            near = near | (_position(keys) < self.sinks)[:, None]
        return near & _reached(queries, keys) if self.causal else near

    def span(self, first, last, *, packed=False):
        return first - self.window + 1, last + (1 if self.causal else self.window)

    @property
    def anchors(self):
        return self.sinks


@dataclass(frozen=True)
class Chunked(Mask):
    """Causal inside chunks of `size` tokens of the document (Llama 4)."""

    size: int = 8192

    def validate(self):
        require_positive(self, "size")

    def visible(self, queries, keys):
        same = (_position(queries) // self.size)[:, :, None] == (_position(keys) // self.size)[:, None]
        return same & _reached(queries, keys)

    def span(self, first, last, *, packed=False):
        return first - self.size + 1 if packed else first // self.size * self.size, last + 1

    @property
    def counts(self):
        return True


def _position(places: Places) -> Any:
    return places.index if places.position is None else places.position


def _reached(queries: Places, keys: Places) -> Any:
    return queries.index[:, :, None] >= keys.index[:, None]  # type: ignore[index]


def _distance(queries: Places, keys: Places) -> Any:
    return queries.index[:, :, None] - keys.index[:, None]  # type: ignore[index]


def visible(mask: Mask, queries: Places, keys: Places) -> jax.Array | None:
    """`[B or 1, L, M]`: what the mask shows inside a query's document; None: all."""
    seen, same = mask.visible(queries, keys), _same_document(queries.segment, keys.segment)
    if seen is None or same is None:
        return seen if same is None else same
    return seen & same


def _same_document(queries_BL: jax.Array | None, keys_BM: jax.Array | None) -> jax.Array | None:
    if queries_BL is None and keys_BM is None:
        return None
    if queries_BL is None:
        return (keys_BM >= 0)[:, None]  # type: ignore[operator,index]
    if keys_BM is None:
        return (queries_BL >= 0)[:, :, None]
    return (queries_BL[:, :, None] == keys_BM[:, None]) & (keys_BM >= 0)[:, None]


def bounds(mask: Mask, first: int, last: int, keys: int, *, packed: bool) -> tuple[int, int]:
    """The keys [low, high) of `keys` that queries at [first, last] may meet, all counted from 0; packed: as `span` has it."""
    low, high = mask.span(first, last, packed=packed)
    low = 0 if low is None or mask.anchors else min(max(low, 0), keys)
    return low, keys if high is None else min(max(high, low), keys)
