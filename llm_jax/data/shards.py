"""One shard of token files: a worker reads its pieces of the corpus, tokenizes, and writes what is whole under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data.corpus import Corpus, Piece
from llm_jax.data.tokenizers import Fitted, Tokenizer

SPLITS = ("train", "valid", "test")
SHARD = "shard.json"
EVERY = 64  # documents between two reports of a worker


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
    """The ids and starts of a split of a shard."""

    def __init__(self, files: contextlib.ExitStack, folder: pathlib.Path, split: str, work: Work):
        self.names = [f"{split}.ids", f"{split}.starts"]
        self.ids, self.starts = (_Written(files.enter_context(open(folder / n, "wb", buffering=1 << 20))) for n in self.names)
        self.dtype, end = work.dtype, work.tokenizer.end
        self.end = np.array([] if end is None else [end], self.dtype)
        self.count = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, text: str, ids: np.ndarray) -> None:
        self.starts.write(np.array([self.count["tokens"]], "<i8"))
        self.ids.write(ids.astype(self.dtype))
        self.ids.write(self.end)
        self.count["documents"] += 1
        self.count["tokens"] += len(ids) + len(self.end)
        self.count["bytes"] += len(text.encode("utf-8", "surrogatepass"))

    def described(self) -> dict[str, Any]:
        return dict(zip(self.names, (self.ids.described(), self.starts.described()), strict=True))


@dataclass
class Work:
    """What all shards have in common. tally: told now and then how many documents and tokens there are more."""

    corpus: Corpus
    tokenizer: Fitted
    out: pathlib.Path
    dtype: np.dtype
    tally: Callable[[int, int], None] = field(default=lambda documents, tokens: None)


def name_of(number: int) -> str:
    """The folder of a shard."""
    return f"shard-{number:05d}"


def write(work: Work, number: int, pieces: Sequence[Piece]) -> None:
    """Writes a shard; the same pieces give the same bytes, whoever writes them. Raises `ConfigError` for what cannot be read."""
    final = work.out / name_of(number)
    partial = work.out / f".{final.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with contextlib.ExitStack() as files:
            told = _fill(work, {split: _Split(files, partial, split, work) for split in SPLITS}, pieces)
        (partial / SHARD).write_text(json.dumps(told, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fill(work: Work, splits: dict[str, _Split], pieces: Sequence[Piece]) -> dict[str, Any]:
    read, skipped, first, untold = 0, 0, None, [0, 0]
    for piece in pieces:
        for name, text in work.corpus.read(piece):
            read += 1
            if isinstance(text, ConfigError):
                if work.corpus.bad == "fatal":
                    raise text
                skipped, first = skipped + 1, first or str(text)
                continue
            for split, out in splits.items():
                if chosen := work.corpus.part(name, text, split):
                    ids = work.tokenizer.encode(chosen)
                    out.add(chosen, ids)
                    untold = [untold[0] + 1, untold[1] + len(ids) + len(out.end)]
            if untold[0] >= EVERY:
                work.tally(*untold)
                untold = [0, 0]
    work.tally(*untold)
    counts = {split: out.count for split, out in splits.items()}
    written = {name: told for out in splits.values() for name, told in out.described().items()}
    told = {"tokenizer": work.tokenizer.fingerprint, "read": read, "skipped": skipped, "first_skipped": first}
    return told | {"splits": counts, "files": written}


# ── a tokenizer without a corpus ─────────────────────────────────────────────────────────────────────────────────────
class NeedsTextError(Exception):
    """A tokenizer has asked for the corpus's text."""


class _NoText(Corpus):
    abstract = True

    def named(self):
        raise NeedsTextError

    def documents(self, split):
        raise NeedsTextError

    def fingerprint(self):
        raise NeedsTextError


def without_text(tokenizer: Tokenizer, cache: str | os.PathLike) -> Fitted:
    """The tokenizer, made without a corpus. Raises `NeedsTextError` where it cannot be."""
    return tokenizer.fit(_NoText(), cache)
