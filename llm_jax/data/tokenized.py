"""The token stores of a corpus: made once and cached, or those that `prepare` wrote."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil

import numpy as np

from llm_jax.core.config import fingerprint
from llm_jax.core.platform import cores
from llm_jax.data.corpora import Corpus, Split
from llm_jax.data.store import Joined, Tokens
from llm_jax.data.tokenizers import Fitted


def tokenize(corpus: Corpus, tokenizer: Fitted, split: Split | str, cache: str | os.PathLike) -> Tokens:
    """The token store of a split: the corpus's own, or from the `cache` folder if it is whole there.

    Raises what reading the corpus raises.
    """
    ready = corpus.store(tokenizer.fingerprint, split, os.fspath(cache))
    if ready is not None:
        return ready
    identity = fingerprint([corpus.fingerprint(), repr(corpus), tokenizer.fingerprint, split])
    folder = pathlib.Path(cache) / "tokens" / identity
    if not (folder / "meta.json").is_file():
        _write(folder, corpus, tokenizer, split)
    return _opened(str(folder), tokenizer.end, split)


def _opened(folder: str, end: int | None, split: str) -> Tokens:
    path = pathlib.Path(folder)
    meta = json.loads((path / "meta.json").read_text())
    ids = Joined([(path / "ids.bin", meta["tokens"])], meta["dtype"])
    reopen = functools.partial(_opened, folder, end, split)
    return Tokens(ids, np.load(path / "starts.npy", mmap_mode="r" if meta["tokens"] else None), end, split, path.name, reopen)


def _write(folder: pathlib.Path, corpus: Corpus, tokenizer: Fitted, split: Split | str) -> None:
    """Fills a folder beside the final one and renames it: what is under the final name is whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
    starts, total = [], 0
    with open(partial / "ids.bin", "wb") as out:
        end = np.array([] if tokenizer.end is None else [tokenizer.end], dtype)
        for ids in tokenizer.encode_all(corpus.documents(split), threads=cores()):
            starts.append(total)
            total += len(ids) + len(end)
            ids.astype(dtype).tofile(out)
            end.tofile(out)
    np.save(partial / "starts.npy", np.array(starts, np.int64))
    (partial / "meta.json").write_text(json.dumps({"tokens": total, "dtype": dtype.name}))
    if folder.exists() and not (folder / "meta.json").is_file():  # by hand or by a broken disk: ours are renamed whole
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial, ignore_errors=True)
