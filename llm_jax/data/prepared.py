"""Token files that `python -m llm_jax prepare` wrote, as a corpus: read where they lie, checked against their checksums.

manifest.json       what it is: corpus, tokenizer, totals, and size and SHA-256 of every file; written last
shard-00000/        train.ids (uint16 or uint32, little-endian), train.starts (int64, of each document in it), the same of valid
                    and test, and shard.json, which says how many
train.starts.npy    where each document begins in all shards together
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, fingerprint, require
from llm_jax.data.corpus import Corpus
from llm_jax.data.files import is_remote
from llm_jax.data.store import Joined, Tokens

MANIFEST, FORMAT = "manifest.json", 1
AGAIN = "run the same `python -m llm_jax prepare` again, it makes what is damaged anew"


@dataclass(frozen=True)
class Prepared(Corpus):
    """A folder of token files; nothing of it is held in memory but what a batch takes.

    The splits are those it was made with, and the experiment's tokenizer must be the one it was made with. verify: checksums are
    compared before the first use, and again only when a file's size or time changes; sizes always are.
    """

    path: str = ""
    verify: bool = True

    def validate(self):
        require(bool(self.path), "path", "is missing: name a folder that `python -m llm_jax prepare` wrote")
        require_local(self.path, "path")

    @property
    def folder(self) -> pathlib.Path:
        """Where it lies."""
        return pathlib.Path(self.path).expanduser()

    @property
    def splits(self):
        return tuple(self.manifest()["splits"])

    def named(self):
        needed = "which a tokenizer is trained on, and one that loses some of it is measured on"
        raise ConfigError(f"has tokens and no text, {needed}: set tokenizer={written(self.folder)}", "data.corpus")

    def documents(self, split):
        return self.named()

    def fingerprint(self, cache=None):
        manifest = self.manifest()
        return fingerprint([manifest["tokenizer"]["fingerprint"], manifest["files"]])

    def manifest(self) -> dict[str, Any]:
        """What `prepare` wrote down. Raises `ConfigError` where it did not come to its end."""
        return read_manifest(self.folder)

    def store(self, tokenizer, split, cache):
        manifest = self.manifest()
        made = manifest["tokenizer"]
        if tokenizer != made["fingerprint"]:
            raise ConfigError(
                f"is not the one that {self.path!r} was made with ({tokenizer}, not {made['fingerprint']}): "
                f"set tokenizer={written(self.folder)}",
                "tokenizer",
            )
        self.require_split(split)
        check(self.folder, _files(manifest, split), cache if self.verify else None)
        return _opened(str(self.folder), str(split))


def require_local(path: str, field: str) -> None:
    """Raises `ConfigError` for an address, such as gs://…: token files are mapped into memory."""
    way_out = "name a local or mounted folder, and copy it there and back by other means"
    require(not is_remote(path), field, f"must be a folder on this machine, got {path!r}: {way_out}")


def _files(manifest: dict[str, Any], split: str) -> dict[str, Any]:
    return {name: told for name, told in manifest["files"].items() if name.rpartition("/")[2].split(".")[0] == split}


def _opened(folder: str, split: str) -> Tokens:
    path = pathlib.Path(folder)
    manifest = read_manifest(path)
    files, dtype = _files(manifest, split), np.dtype(manifest["dtype"])
    ids = Joined([(path / name, told["bytes"] // dtype.itemsize) for name, told in files.items() if name.endswith(".ids")], dtype)
    starts = np.load(path / f"{split}.starts.npy", mmap_mode="r" if len(ids) else None)
    reopen = functools.partial(_opened, folder, split)
    return Tokens(ids, starts, manifest["tokenizer"]["end"], split, fingerprint(files), reopen)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder. Raises `ConfigError` where there is none, or it is not ours."""
    file = folder / MANIFEST
    if not file.is_file():
        told = "is not finished: run the same `python -m llm_jax prepare` again" if (folder / "plan.json").is_file() else (
            "is no folder of token files: `python -m llm_jax prepare` writes them"
        )  # fmt: skip
        raise ConfigError(told, repr(str(folder)))
    stat = file.stat()
    return _manifest(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(16)
def _manifest(file: pathlib.Path, size: int, time: int) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"is damaged: {error}: {AGAIN}", str(file)) from None
    if manifest.get("format") != FORMAT:
        raise ConfigError(f"has format {manifest.get('format')!r}, and this version reads {FORMAT}", str(file))
    return manifest


def written(folder: pathlib.Path) -> str:
    """The tokenizer of token files as an experiment or a flag names it; one that was trained for them lies beside them."""
    made = read_manifest(folder)["tokenizer"]
    return made["written"] if made["file"] is None else f"SentencePiece(path={str(folder / made['file'])!r})"


# ── checksums ────────────────────────────────────────────────────────────────────────────────────────────────────────
def described(file: pathlib.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest has them."""
    with open(file, "rb") as content:
        return {"bytes": os.fstat(content.fileno()).st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def damaged(folder: pathlib.Path, wanted: dict[str, Any], *, contents: bool = True) -> list[str]:
    """What is wrong with each of these files, as a sentence; contents: also compares checksums, several files at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda item: _wrong(folder / item[0], item[1], contents), wanted.items())
        return [sentence for sentence in found if sentence]


def _wrong(file: pathlib.Path, wanted: dict[str, Any], contents: bool) -> str:
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != wanted["bytes"]:
        return f"{file} has {size:,} bytes and should have {wanted['bytes']:,}"
    if contents and (sha256 := described(file)["sha256"]) != wanted["sha256"]:
        return f"{file} is corrupted: its SHA-256 is {sha256[:12]}… and should be {wanted['sha256'][:12]}…"
    return ""


def check(folder: pathlib.Path, wanted: dict[str, Any], cache: str | os.PathLike | None) -> None:
    """Raises `ConfigError` that names what is damaged. cache: where it is noted that checksums were right; None: sizes alone."""
    raise_for(damaged(folder, wanted, contents=False))
    if cache is None:
        return
    states = [[str((folder / name).resolve()), (folder / name).stat().st_mtime_ns, told] for name, told in wanted.items()]
    note = pathlib.Path(cache) / "verified" / fingerprint(states)
    if not note.is_file():
        raise_for(damaged(folder, wanted))
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def raise_for(sentences: Sequence[str]) -> None:
    """Raises `ConfigError` unless there are none."""
    if sentences:
        more = f", and {len(sentences) - 1} more" if len(sentences) > 1 else ""
        raise ConfigError(f"{sentences[0]}{more}: {AGAIN}")
