"""The token stores of a corpus: made once and cached, or those that `prepare` wrote."""

from __future__ import annotations

import functools
import json
import os
import pathlib

import numpy as np

from llm_jax.core.config import fingerprint
from llm_jax.core.platform import cores
from llm_jax.core.whole import whole_folder
from llm_jax.data.corpora import Corpus, Split
from llm_jax.data.store import Joined, Tokens, write_starts_header
from llm_jax.data.tokenizers import Fitted


def tokenize(corpus: Corpus, tokenizer: Fitted, split: Split | str, cache: str | os.PathLike) -> Tokens:
    """The token store of a split: the corpus's own, or from the `cache` folder if it is whole there.

    Raises what reading the corpus raises.
    """
    ready = corpus.store(tokenizer.fingerprint, split, os.fspath(cache))
    if ready is not None:
        return ready
    identity = fingerprint([corpus.fingerprint(cache), repr(corpus), tokenizer.fingerprint, split])
    folder = pathlib.Path(cache) / "tokens" / identity
    if not _is_whole(folder):
        _write(folder, corpus, tokenizer, split)
    return _opened(str(folder), tokenizer.end, split)


def _opened(folder: str, end: int | None, split: str) -> Tokens:
    path = pathlib.Path(folder)
    meta = json.loads((path / "meta.json").read_text())
    ids = Joined([(path / "ids.bin", meta["tokens"])], meta["dtype"])
    reopen = functools.partial(_opened, folder, end, split)
    return Tokens(ids, np.load(path / "starts.npy", mmap_mode="r" if meta["tokens"] else None), end, split, path.name, reopen)


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether files are as long as they say: whoever writes renames what is whole, but disks fill up and copies are cut off."""
    try:
        tokens = _opened(str(folder), None, "")
        return (folder / "ids.bin").stat().st_size == len(tokens) * tokens.ids.dtype.itemsize
    except (OSError, EOFError, ValueError, LookupError):
        return False


def _write(folder: pathlib.Path, corpus: Corpus, tokenizer: Fitted, split: Split | str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
    documents = total = 0
    with whole_folder(folder, stands=_is_whole) as partial:
        with open(partial / "ids.bin", "wb") as out, open(partial / "starts.npy", "wb") as starts:
            write_starts_header(starts, 0)
            end = np.array([] if tokenizer.end is None else [tokenizer.end], dtype)
            for ids in tokenizer.encode_all(corpus.documents(split), threads=cores()):
                starts.write(total.to_bytes(8, "little"))
                documents, total = documents + 1, total + len(ids) + len(end)
                out.write(ids.astype(dtype).tobytes())
                out.write(end.tobytes())
            starts.seek(0)
            write_starts_header(starts, documents)
        (partial / "meta.json").write_text(json.dumps({"tokens": total, "dtype": dtype.name}))
