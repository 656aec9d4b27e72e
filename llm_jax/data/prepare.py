"""Raw text into sharded, checksummed token files: in parallel, and again from where it was killed.

What is in a shard depends on the corpus and `shard_bytes` alone, never on the number of workers or on what was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, fingerprint, to_json
from llm_jax.core.whole import left, remove_left, whole_file, write_whole
from llm_jax.data import prepared, shards
from llm_jax.data.corpus import Corpus, Piece, empty_corpus
from llm_jax.data.prepared import FORMAT, MANIFEST
from llm_jax.data.shards import SPLITS, NeedsTextError, Work, name_of, without_text
from llm_jax.data.store import write_starts_header
from llm_jax.data.tokenizers import Fitted, SentencePiece, Tokenizer
from llm_jax.data.workers import Progress, in_parallel, in_turn

SHARD_BYTES = 1 << 27
PLAN, MODEL = "plan.json", "tokenizer.model"
OURS = (PLAN, MODEL, MANIFEST, "*.starts.npy", "shard-*")


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    cache: str | os.PathLike,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Writes the folder that `Prepared(path=out)` reads; returns its manifest. The same call again goes on where it stopped.

    shard_bytes: text of a shard, about, where the corpus can be cut; workers: processes, or threads where shards are fewer. A
    shard that is there already is checked, and made anew if it is damaged, which `note` is told. tell: gets the progress a few
    times a second. Raises `ConfigError` for what cannot be read, or a folder that belongs to another corpus or tokenizer.
    """
    prepared.require_local(os.fspath(out), "out")
    folder = pathlib.Path(out).expanduser()
    if corpus.members("train")[0].corpus is not corpus:
        told = "whose sources are prepared one by one, for a mixture of Prepared(path=…)"
        raise ConfigError(f"is {type(corpus).__name__}, {told}", "corpus")
    if type(corpus).documents is not Corpus.documents:
        raise ConfigError(f"is {type(corpus).__name__}, which has no text to prepare: an experiment reads it as it is", "corpus")
    groups = _grouped(corpus.pieces(shard_bytes), shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        plan = _plan(corpus, tokenizer, shard_bytes)
        _refuse_others(folder, plan)
        remove_left(folder, OURS)
        model = _trained_model(corpus, tokenizer, folder, cache)
        write_whole(folder / PLAN, json.dumps(plan, indent=1))
        if model is not None:
            write_whole(folder / MODEL, model)
        named = tokenizer if model is None else SentencePiece(path=str(folder / MODEL))
        fitted = without_text(named, cache)
        dtype = np.dtype("<u2" if fitted.vocabulary <= 1 << 16 else "<u4")
        sizes = [sum(piece.size for piece in pieces) for pieces in groups]
        waiting = [number for number in range(len(groups)) if not _is_whole(folder, number, corpus, fitted, note)]
        progress = Progress(len(groups) - len(waiting), len(groups), sum(sizes) - sum(sizes[n] for n in waiting), sum(sizes))
        tell(progress)
        processes = max(min(workers, len(waiting)), 1)
        run = in_turn if processes == 1 else in_parallel(named, fitted.fingerprint, cache, processes)
        work = Work(corpus, fitted, folder, dtype, threads=workers // processes)
        with contextlib.closing(run(work, {number: groups[number] for number in waiting}, progress, tell)) as finished:
            for number in finished:
                progress.shards, progress.bytes = progress.shards + 1, progress.bytes + sizes[number]
                tell(progress)
        return _finish(folder, len(groups), dtype, corpus, tokenizer, fitted, shard_bytes)


def _grouped(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Pieces that follow one another, together until they have `size` bytes: what makes a shard each."""
    groups: list[list[Piece]] = [[]]
    room = 0
    for piece in pieces:
        if groups[-1] and room + piece.size > size:
            groups.append([])
            room = 0
        groups[-1].append(piece)
        room += piece.size
    return groups


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                "is being written by another process: wait for it, or name another folder", repr(str(folder))
            ) from None
        yield


def _plan(corpus: Corpus, tokenizer: Tokenizer, shard_bytes: int) -> dict[str, Any]:
    """What must be the same for shards to belong together."""
    files = sorted({(piece.file, piece.size, piece.modified) for piece in corpus.pieces() if piece.file})
    return {
        "corpus": {name: value for name, value in to_json(corpus).items() if name != "bad"},  # what is skipped can be decided late
        "tokenizer": to_json(tokenizer),
        "shard_bytes": shard_bytes,
        "files of the corpus": fingerprint(files or corpus.fingerprint()),
    }


def _refuse_others(folder: pathlib.Path, plan: dict[str, Any]) -> None:
    """Raises `ConfigError` where the folder is for something else."""
    where = repr(str(folder))
    if not (folder / PLAN).is_file():
        ours = {".lock", *(path.name for path in left(folder, OURS))}  # it may have been killed while it wrote the plan
        others = [name for name in os.listdir(folder) if name not in ours]
        if others:
            raise ConfigError(f"has other files in it ({others[0]}): name an empty or a new folder", where)
        return
    before = json.loads((folder / PLAN).read_text())
    changed = [f"{name} was {before.get(name)} and is {plan[name]}" for name in plan if before.get(name) != plan[name]]
    if changed:
        raise ConfigError(f"was begun for something else ({'; '.join(changed)}): name another folder, or delete it", where)


def _is_whole(folder: pathlib.Path, number: int, corpus: Corpus, fitted: Fitted, note: Callable[[str], None]) -> bool:
    shard = folder / name_of(number)
    if not shard.is_dir():
        return False
    try:
        told = json.loads((shard / shards.SHARD).read_bytes())
        if told["tokenizer"] != fitted.fingerprint:
            raise ConfigError(f"is not the one that {shard} was made with: name another folder, or delete it", "tokenizer")
        wrong = prepared.damaged(shard, told["files"])
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError) as error:
        wrong = [f"{shard / shards.SHARD} cannot be read ({error})"]
    for sentence in wrong:
        note(f"{sentence}: the shard is made anew")
    return not wrong and not (told["skipped"] and corpus.bad == "fatal")


def _finish(
    folder: pathlib.Path, count: int, dtype: np.dtype, corpus: Corpus, tokenizer: Tokenizer, fitted: Fitted, shard_bytes: int
) -> dict[str, Any]:
    """The index of documents over all shards, and the manifest."""
    told = [json.loads((folder / name_of(number) / shards.SHARD).read_text()) for number in range(count)]
    totals = {
        split: {key: sum(t["splits"][split][key] for t in told) for key in ("documents", "tokens", "bytes")} for split in SPLITS
    }
    if not any(total["documents"] for total in totals.values()):
        raise empty_corpus()
    files = {f"{name_of(i)}/{name}": file for i, shard in enumerate(told) for name, file in shard["files"].items()}
    for split in SPLITS:
        index = folder / f"{split}.starts.npy"
        _index(index, [(folder / name_of(i) / f"{split}.starts", t["splits"][split]) for i, t in enumerate(told)])
        files[index.name] = prepared.described(index)
    own = (folder / MODEL).is_file()
    if own:
        files[MODEL] = prepared.described(folder / MODEL)
    manifest = {
        "format": FORMAT,
        "corpus": to_json(corpus),
        "tokenizer": {
            "written": repr(tokenizer),
            "file": MODEL if own else None,
            "fingerprint": fitted.fingerprint,
            "vocabulary": fitted.vocabulary,
            "end": fitted.end,
        },
        "dtype": dtype.name,
        "shard_bytes": shard_bytes,
        "splits": totals,
        "read": sum(t["read"] for t in told),
        "skipped": sum(t["skipped"] for t in told),
        "first_skipped": next((t["first_skipped"] for t in told if t["skipped"]), None),
        "files": files,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _index(file: pathlib.Path, parts: Sequence[tuple[pathlib.Path, dict[str, int]]]) -> None:
    with whole_file(file) as partial, open(partial, "wb") as out:
        write_starts_header(out, sum(count["documents"] for _, count in parts))
        before = 0
        for starts, count in parts:
            out.write((np.fromfile(starts, "<i8") + before).tobytes())
            before += count["tokens"]


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────
def _trained_model(corpus: Corpus, tokenizer: Tokenizer, folder: pathlib.Path, cache: str | os.PathLike) -> bytes | None:
    """The model of a tokenizer that is trained on the corpus, so that whoever reads the tokens can do without; None for others."""
    try:
        without_text(tokenizer, cache)
        return None
    except NeedsTextError:
        pass
    if (folder / MODEL).is_file():
        return (folder / MODEL).read_bytes()
    fitted = tokenizer.fit(corpus, cache)
    if fitted.model is None:
        train = "train it once with `python -m llm_jax tokenize train --output=DIR` and take HuggingFace(path='DIR')"
        way = "take Bytes(), or one that is in a file" if fitted.json is None else train
        raise ConfigError(f"is {tokenizer!r}, which every corpus makes anew from its text: {way}", "tokenizer")
    return fitted.model
