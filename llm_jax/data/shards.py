"""One shard of token files: a worker reads its pieces of the corpus, tokenizes, and writes what is whole under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from llm_jax.core.whole import whole_folder
from llm_jax.data.corpus import Corpus, Piece, Readable
from llm_jax.data.tokenizers import Fitted, Tokenizer

SPLITS = ("train", "valid", "test")
SHARD = "shard.json"
BLOCK = 1 << 15  # tokens between two writes to a file, and between two reports of a worker


class _Written:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values).data.cast("B")
        self.file.write(content)
        self.digest.update(content)
        self.bytes += len(content)

    def described(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


class _Split:
    """The ids and starts of a split of a shard, written `BLOCK` tokens at a time."""

    def __init__(self, files: contextlib.ExitStack, folder: pathlib.Path, split: str, work: Work):
        self.names = [f"{split}.ids", f"{split}.starts"]
        self.ids, self.starts = (_Written(files.enter_context(open(folder / n, "wb"))) for n in self.names)
        self.dtype, end = work.dtype, work.tokenizer.end
        self.end = [] if end is None else [np.array([end], np.int32)]
        self.count = {"documents": 0, "tokens": 0, "bytes": 0}
        self._ids: list[np.ndarray] = []
        self._starts: list[int] = []
        self._written = 0

    def add(self, ids: np.ndarray) -> int:
        """Takes a document's ids; the number of its tokens."""
        self._starts.append(self.count["tokens"])
        self._ids += [ids, *self.end]
        tokens = len(ids) + len(self.end)
        self.count["documents"] += 1
        self.count["tokens"] += tokens
        if self.count["tokens"] - self._written >= BLOCK:
            self._write()
        return tokens

    def _write(self) -> None:
        if self._starts:
            self.starts.write(np.array(self._starts, "<i8"))
            self.ids.write(np.concatenate(self._ids, dtype=self.dtype, casting="unsafe"))
        self._starts, self._ids, self._written = [], [], self.count["tokens"]

    def described(self) -> dict[str, Any]:
        """What is in the files, of which this writes the rest."""
        self._write()
        return dict(zip(self.names, (self.ids.described(), self.starts.described()), strict=True))


@dataclass
class Work:
    """What all shards have in common.

    tally: told now and then how many documents and tokens there are more; threads: of encoding.
    """

    corpus: Corpus
    tokenizer: Fitted
    out: pathlib.Path
    dtype: np.dtype
    tally: Callable[[int, int], None] = field(default=lambda documents, tokens: None)
    threads: int = 1


def name_of(number: int) -> str:
    """The folder of a shard."""
    return f"shard-{number:05d}"


def write(work: Work, number: int, pieces: Sequence[Piece]) -> None:
    """Writes a shard; the same pieces give the same bytes, whoever writes them. Raises `ConfigError` for what cannot be read."""
    with whole_folder(work.out / name_of(number), stands=lambda damaged: False) as partial:
        with contextlib.ExitStack() as files:
            told = _fill(work, {split: _Split(files, partial, split, work) for split in SPLITS}, pieces)
        (partial / SHARD).write_text(json.dumps(told, indent=1))


def _fill(work: Work, splits: dict[str, _Split], pieces: Sequence[Piece]) -> dict[str, Any]:
    reading, untold = _Reading(Readable(work.corpus), splits, pieces), [0, 0]
    for ids in work.tokenizer.encode_all(reading.texts(), threads=work.threads):
        untold = [untold[0] + 1, untold[1] + reading.goes_to.popleft().add(ids)]
        if untold[1] >= BLOCK:
            work.tally(*untold)
            untold = [0, 0]
    work.tally(*untold)
    counts = {split: out.count for split, out in splits.items()}
    written = {name: told for out in splits.values() for name, told in out.described().items()}
    readable = reading.readable
    told = {"tokenizer": work.tokenizer.fingerprint, "read": readable.read}
    told |= {"skipped": readable.skipped, "first_skipped": readable.first_skipped}
    return told | {"splits": counts, "files": written}


@dataclass
class _Reading:
    """The documents of a shard on their way to the tokenizer; goes_to: the splits of those that it has not given back."""

    readable: Readable
    splits: dict[str, _Split]
    pieces: Sequence[Piece]
    goes_to: deque[_Split] = field(default_factory=deque)

    def texts(self) -> Iterator[str]:
        for piece in self.pieces:
            for name, text in self.readable.of(piece):
                for split, out in self.splits.items():
                    if chosen := self.readable.corpus.part(name, text, split):
                        out.count["bytes"] += len(chosen.encode("utf-8", "surrogatepass"))
                        self.goes_to.append(out)
                        yield chosen


# ── a tokenizer without a corpus ─────────────────────────────────────────────────────────────────────────────────────
class NeedsTextError(Exception):
    """A tokenizer has asked for the corpus's text."""


class _NoText(Corpus):
    abstract = True

    def named(self):
        raise NeedsTextError

    def documents(self, split):
        raise NeedsTextError

    def fingerprint(self, cache=None):
        raise NeedsTextError


def without_text(tokenizer: Tokenizer, cache: str | os.PathLike) -> Fitted:
    """The tokenizer, made without a corpus. Raises `NeedsTextError` where it cannot be."""
    return tokenizer.fit(_NoText(), cache)
