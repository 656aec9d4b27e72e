"""What a corpus is: documents of text, streamed, each with a name that decides which split it belongs to."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from llm_jax.core.config import Config, ConfigError, fingerprint
from llm_jax.core.whole import write_whole
from llm_jax.data.apportion import ALONE, Apportionment

if TYPE_CHECKING:
    from llm_jax.data.store import Tokens

Split = Literal["train", "valid", "test"]
State = tuple[tuple[str, int, str, int], ...]  # of files: path or address, size, modified, changed

DIGITS = 16  # of a content's fingerprint
SETTLED = 2.0  # seconds: what is changed again sooner may keep its time


@dataclass(frozen=True)
class Piece:
    """A stretch of a corpus that is read by itself: a file, or the part of it from `start` to before `stop`.

    file: its path or address; name: the file's, stable across machines; size: bytes, about; modified: whatever the file system
    tells of when it was written. start, stop: bytes of text or numbers of rows, stop None is the end; first: lines before it.
    """

    file: str
    name: str
    size: int = 0
    modified: str = ""
    start: int = 0
    stop: int | None = None
    first: int = 0


class Member(NamedTuple):
    """A corpus whose rows are drawn, alone or beside others: its name, which split of it, and of that how many rows (None: all)."""

    name: str
    corpus: Corpus
    split: Split | str
    rows: int | None = None


@dataclass(frozen=True)
class Corpus(Config):
    """Documents of text. The order, the splits and the fingerprint are functions of the content alone.

    Nothing but the document at hand is in memory. A corpus of its own gives `named` and `part`; one that several processes
    should read at once gives `pieces` and `read`. bad: what is done about a document that cannot be read.
    """

    abstract = True
    bad = "fatal"

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of more splits, each scored once training is done: as "valid/loss@name" and so on."""
        return ()

    @property
    def splits(self) -> tuple[str, ...]:
        """Everything that there are documents of: train, valid and test, and `probes`."""
        return (*get_args(Split), *self.probes)

    def require_split(self, split: Split | str) -> None:
        """Raises `ConfigError` unless there is such a split."""
        if split not in self.splits:
            raise ConfigError(f"has no split {split!r}: it has {', '.join(self.splits)}", "data.corpus")

    def check(self, sequence_length: int) -> None:
        """Raises `ConfigError` where rows of so many tokens cannot be cut from it."""

    def members(self, split: Split | str) -> Sequence[Member]:
        """The corpora whose rows are drawn for a split."""
        return [Member(type(self).__name__, self, split)]

    def apportioned(self, rows: Sequence[int], total: int) -> Apportionment:
        """Whose turn it is when, in training on `total` rows. rows: how many each of the members has."""
        return ALONE

    def pieces(self, size: int | None = None) -> Sequence[Piece]:
        """The corpus in pieces, in order, each of about `size` bytes or less where it can be cut; None: uncut."""
        return [Piece("", type(self).__name__)]

    def read(self, piece: Piece) -> Iterator[tuple[str, str | ConfigError]]:
        """(name, text) of every document of a piece, or what is wrong with it. Raises `ConfigError` for a damaged file."""
        yield from self.named()

    def named(self) -> Iterator[tuple[str, str]]:
        """Every document as (a name that is stable across machines, text). Raises `ConfigError` for unreadable input.

        Where `bad` is "skip", documents that cannot be read are left out, and a warning counts them.
        """
        readable = Readable(self)
        for piece in self.pieces():
            yield from readable.of(piece)
        if readable.skipped:
            told = f"{readable.skipped:,} of {readable.read:,} documents, the first because {readable.first_skipped}"
            _warn_once(f"skipped {told}")

    def part(self, name: str, text: str, split: Split | str) -> str:
        """What of a document belongs to the split; empty for nothing."""
        raise NotImplementedError

    def documents(self, split: Split | str) -> Iterator[str]:
        """The documents of a split, or of one of `probes`. Raises `ConfigError` for another, or if the whole corpus is empty."""
        self.require_split(split)
        empty = True
        for name, text in self.named():
            empty = empty and not text
            chosen = self.part(name, text, split)
            if chosen:
                yield chosen
        if empty:
            raise empty_corpus()

    def store(self, tokenizer: str, split: Split | str, cache: str) -> Tokens | None:
        """The tokens of a split where they are written already; None for text. tokenizer: the fingerprint they must have.

        Raises `ConfigError` where they are another tokenizer's, or damaged.
        """
        return None

    def fingerprint(self, cache: str | os.PathLike | None = None) -> str:
        """Sixteen hexadecimal digits of everything that is in it, in order.

        Its text is read for them, and again when one of its files changes. cache: a folder in which later processes find them.
        """
        return _fingerprint(self, cache)


@dataclass
class Readable:
    """Documents of a corpus that can be read; the others are raised, or left out and counted, as its `bad` says."""

    corpus: Corpus
    read: int = 0
    skipped: int = 0
    first_skipped: str | None = None

    def of(self, piece: Piece) -> Iterator[tuple[str, str]]:
        """(name, text) of each of a piece. Raises `ConfigError`."""
        for name, text in self.corpus.read(piece):
            self.read += 1
            if not isinstance(text, ConfigError):
                yield name, text
                continue
            if self.corpus.bad == "fatal":
                raise text
            self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or str(text)


def empty_corpus() -> ConfigError:
    """For a corpus in which there is no text."""
    return ConfigError("is an empty corpus: there is no text in it", "data.corpus")


@functools.cache
def _warn_once(sentence: str) -> None:
    logging.getLogger("llm_jax").warning(sentence)  # a corpus is read for its fingerprint and for each split


@functools.lru_cache(1)  # it is asked for once for each split
def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def by_name(name: str, valid: float, test: float) -> Split:
    """The split of a document, of which these fractions are for validation and test."""
    at = share(name)
    return "test" if at < test else "valid" if at < test + valid else "train"


# ── the fingerprint of its content ───────────────────────────────────────────────────────────────────────────────────
def _fingerprint(corpus: Corpus, cache: str | os.PathLike | None) -> str:
    """Remembered while all files are what they were, and noted in the `cache` folder.

    Not noted is a corpus that has parts in no file or in a store that tells no versions; one that is defined elsewhere, because how
    it reads may change; and one that may leave documents out, of which every process is to warn.
    """
    state = _state(corpus)
    if state is None:
        return _hashed(corpus)
    ours = type(corpus).__module__.startswith(f"{__package__}.") and corpus.bad == "fatal"
    if cache is None or not ours or not state or not all(modified for _, _, modified, _ in state):
        return _remembered(corpus, state)
    note = pathlib.Path(cache) / "contents" / fingerprint([repr(corpus), _code(), state])
    known = note.read_text() if note.is_file() else ""
    if len(known) != DIGITS:
        known = _remembered(corpus, state)
        if _state(corpus) == state:
            write_whole(note, known)
    return known


@functools.lru_cache(256)
def _remembered(corpus: Corpus, state: State) -> str:
    return _hashed(corpus)


def _hashed(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for name, text in corpus.named():
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:DIGITS]


def _state(corpus: Corpus) -> State | None:
    """What differs when a file has changed: () where not all are files, None where one was changed so lately that it may not."""
    found, now = [], time.time()
    for piece in corpus.pieces():
        if not piece.file:
            return ()
        try:
            changed = os.stat(piece.file).st_ctime_ns  # every change sets it, also one that keeps size and modified time
        except OSError:  # far away, where a version has a name of its own
            found.append((piece.file, piece.size, piece.modified, 0))
            continue
        if now - changed / 1e9 < SETTLED:
            return None
        found.append((os.path.abspath(piece.file), piece.size, piece.modified, changed))
    return tuple(found)


@functools.cache
def _code() -> str:
    """Fingerprint of what reads corpora."""
    return fingerprint([file.read_text("utf-8") for file in sorted(pathlib.Path(__file__).parent.glob("*.py"))])
