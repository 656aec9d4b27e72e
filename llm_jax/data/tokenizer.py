"""What every tokenizer is: a configuration that is fitted to a corpus, or loaded, and what comes of it."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import Config, ConfigError, fingerprint, to_json
from llm_jax.core.whole import write_whole
from llm_jax.data import encoding
from llm_jax.data.corpora import Corpus
from llm_jax.data.kinds import kinds
from llm_jax.data.pieces import MARK, character_spans


@dataclass(frozen=True)
class Special:
    """A token that stands for no text. spellings: how published vocabularies have it, the usual one first."""

    spellings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The usual spelling."""
        return self.spellings[0]


class Fitted:
    """A tokenizer ready to use. piece_bytes: the text that each id stands for, b"" for specials; end: the id between documents.

    lossless: whether the pieces of any text, one after another, are that text; where not, bits per byte are off by what is lost.
    unknown: the id of what it has no pieces for, or None. model: the file of SentencePiece that it is, or None; json: the
    `tokenizer.json`. specials: special tokens that were asked for, and their ids.
    """

    lossless = True
    unknown: int | None = None
    model: bytes | None = None
    json: str | None = None
    specials: Mapping[str, int] = {}
    _mark: np.ndarray | None = None  # ids in place of a literal "▁", which would come back as a space
    _cut: encoding.Cut | None = None  # where long texts may be cut without another id

    def __init__(self, piece_bytes: Sequence[bytes], end: int | None, identity: str):
        self.piece_bytes, self.end, self.fingerprint = list(piece_bytes), end, identity

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.piece_bytes)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """`[V]` int32: bytes of text that each id stands for; they sum to the text's own length.

        float32 where the tokenizer loses some: the mean over its corpus, so that they sum to about the text's own length.
        """
        return np.array([len(piece) for piece in self.piece_bytes], np.int32)

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """`[V]` int32: the kind of text that each id stands for, as in `data.kinds`."""
        return kinds(self.piece_bytes)

    def with_specials(self, specials: Sequence[Special]) -> Fitted:
        """The same, knowing an id for each: its own where its vocabulary has it, or else a new one after its last.

        No text becomes a new one, so what is encoded stays what it is, and so does the fingerprint.
        """
        wanted = [special for special in specials if special.name not in self.specials]
        if not wanted:
            return self
        known = {special.name: next((i for i in map(self.id_of, special.spellings) if i is not None), None) for special in wanted}
        new = [name for name, i in known.items() if i is None]
        wider = copy.copy(self)
        for computed in ("byte_lengths", "kinds"):
            wider.__dict__.pop(computed, None)
        wider.piece_bytes = self.piece_bytes + [b""] * len(new)
        found = {name: i for name, i in known.items() if i is not None}
        wider.specials = {**self.specials, **found, **{name: self.vocabulary + k for k, name in enumerate(new)}}
        return wider

    def id_of(self, spelling: str) -> int | None:
        """The id of the special token that its vocabulary spells so, if it has one."""
        return None

    def encode(self, text: str) -> np.ndarray:
        """`[n]` int32 ids."""
        raise NotImplementedError

    def encode_all(self, texts: Iterable[str], *, threads: int = 1) -> Iterator[np.ndarray]:
        """What `encode` gives for each text, in order and sooner; a batch of texts is read ahead, and one more for each thread."""
        return encoding.encode_all(texts, self._parts, self._encoded, threads)

    def _parts(self, text: str) -> Sequence[encoding.Part]:
        """A text in parts that can be encoded one by one, and ids that stand between them; at least one."""
        parts = [text] if self._mark is None else encoding.replaced(text, MARK, self._mark)
        if self._cut is None:
            return parts
        return [one for part in parts for one in (self._cut(part) if isinstance(part, str) else [part])]

    def _encoded(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """The ids of each of a batch of parts, in one thread."""
        return [self.encode(text) for text in texts]

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids `[n]`, and `[n, 2]` where in the text, in characters, what each stands for begins and ends.

        Pieces of one character all have that character. Raises `ConfigError` for a SentencePiece model that loses something.
        """
        if not self.lossless:
            raise ConfigError("loses where its pieces stand in the text: take its tokenizer.json", "tokenizer")
        ids = self.encode(text)
        return ids, character_spans(text, self.byte_lengths[ids])

    def name_of(self, number: int) -> str:
        """What an id is called that stands for no text."""
        return "<end>" if number == self.end else f"<{number}>"

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece_bytes[i] for i in ids).decode("utf-8", "replace")

    def decode_after(self, before: Sequence[int], ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids add to that of those before them; ids that the tokenizer does not know add nothing."""
        known = [int(i) for i in ids if i < self.vocabulary]
        if self.lossless or not before:
            return self.decode(known)
        # some tokenizers drop the space that a text begins with
        begin, whole = self.decode(before), self.decode([*before, *known])
        return whole[len(begin) :] if whole.startswith(begin) else self.decode(known)


def nameless(vocabulary: int) -> Fitted:
    """So many ids that stand for a byte each, whatever byte: for what needs no text."""
    return Fitted([b"\xff"] * vocabulary, None, "nameless")


@dataclass(frozen=True)
class Tokenizer(Config):
    """How text becomes ids."""

    abstract = True

    def fit(self, corpus: Corpus, cache: str | os.PathLike) -> Fitted:
        """The tokenizer made from a corpus, or read from the `cache` folder if it was made before. Raises `ConfigError`."""
        raise NotImplementedError


def trained(config: Tokenizer, corpus: Corpus, cache: str | os.PathLike, suffix: str, train: Callable[[Corpus], bytes]) -> bytes:
    """The file that `train` makes of a corpus, or that it made before: kept in the `cache` folder, whole or not at all."""
    # the corpus's settings say what is trained on
    identity = fingerprint([to_json(config), corpus.fingerprint(cache), repr(corpus)])
    file = pathlib.Path(cache) / "tokenizers" / f"{identity}{suffix}"
    if not file.is_file():
        if next(corpus.documents("train"), None) is None:
            raise ConfigError("has no text in its train split, so no tokenizer can be trained on it", "data.corpus")
        write_whole(file, train(corpus))
    return file.read_bytes()
