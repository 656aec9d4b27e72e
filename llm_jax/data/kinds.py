"""Kinds of tokens, by the text that they stand for: what neighbours in an embedding table are expected to share."""

from __future__ import annotations

import keyword
import string
from collections.abc import Sequence

import numpy as np

_TESTS = {  # the first that the text passes, without the spaces around it
    "space": lambda inner: not inner,
    "keyword": keyword.iskeyword,
    "number": str.isdigit,
    "capitalized word": lambda inner: inner[0].isupper() and inner.replace("_", "a").isalpha(),
    "word": lambda inner: inner.replace("_", "a").isalpha(),
    "punctuation": lambda inner: all(c in string.punctuation for c in inner),
}
KINDS = tuple(_TESTS)
NO_KIND = -1


def kinds(pieces: Sequence[bytes]) -> np.ndarray:
    """`[V]` int32: the place in `KINDS` of each id's text, Python's keywords apart; -1: no text, not ASCII, or of several kinds.

    Of ids that stand for the same text the last counts, since SentencePiece puts bytes in reserve before what it learned.
    """
    last = {piece: index for index, piece in enumerate(pieces)}
    found = [_kind(piece) if last[piece] == index else NO_KIND for index, piece in enumerate(pieces)]
    return np.array(found, np.int32)


def _kind(piece: bytes) -> int:
    if not piece or not piece.isascii():
        return NO_KIND
    inner = piece.decode("ascii").strip(string.whitespace)
    return next((index for index, test in enumerate(_TESTS.values()) if test(inner)), NO_KIND)
