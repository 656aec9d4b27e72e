"""Files wherever they are: paths, folders, patterns and addresses (gs://, s3://, hf://, …), compressed or not."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import json
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from llm_jax.core.config import ConfigError
from llm_jax.data.corpus import Piece

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
FIELD = "data.corpus.path"


def missing(library: str, what: str) -> ConfigError:
    """For a library that is not installed."""
    return ConfigError(f'needs {library} for {what}: pip install -e ".[data]"', "data.corpus")


def with_compressed(pattern: str) -> tuple[str, ...]:
    """A pattern, and the same of compressed files."""
    return (pattern, *(pattern + suffix for suffix in COMPRESSED))


def is_remote(path: str) -> bool:
    """Whether it is an address rather than a path."""
    return "://" in path


def find(path: str, patterns: Sequence[str]) -> list[Piece]:
    """Every file at a path or an address, which may be a file, a folder with such files at any depth, or a pattern; sorted by name.

    A file's name is relative to the folder that was asked for. What is hidden, by a name that begins with ".", as editors and
    copying programs call what they have not written to its end, is found only where the path spells it. Raises `ConfigError` if
    there is none.
    """
    found = _remote(path, patterns) if is_remote(path) else _local(path, patterns)
    if not found:
        kinds = ", ".join(patterns)
        raise ConfigError(f"finds no file at {path!r}: it may be a file, a folder with {kinds} in it, or a pattern", FIELD)
    return sorted(found, key=lambda piece: (piece.name, piece.file))


def _local(path: str, patterns: Sequence[str]) -> list[Piece]:
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        files = [file for file in root.rglob("*") if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
        named = [(file.relative_to(root).as_posix(), file) for file in files]
        named = [(name, file) for name, file in named if not _hidden(name)]
    elif root.is_file():
        named = [(root.name, root)]
    else:
        named = [(pathlib.Path(file).name, pathlib.Path(file)) for file in glob.glob(str(root), recursive=True)]
    told = [(name, file, file.stat()) for name, file in named if file.is_file()]
    return [Piece(str(file), name, stat.st_size, str(stat.st_mtime_ns)) for name, file, stat in told]


def _remote(path: str, patterns: Sequence[str]) -> list[Piece]:
    fs, root = _file_system(path)
    with _sentences(path):
        if any(sign in root for sign in "*?["):
            listed = fs.glob(root, detail=True)
            above = re.split(r"[*?\[]", root)[0].rpartition("/")[0]
            spelled = "/." in root.removeprefix(above)
            names = {file: file.rpartition("/")[2] for file in listed if spelled or not _hidden(file.removeprefix(above))}
        elif fs.isfile(root):  # asked first: a web server has no folders, and would send the file to look for links in it
            listed = {root: fs.info(root)}
            names = {root: root.rpartition("/")[2]}
        else:
            listed = fs.find(root, detail=True)
            names = {file: file.removeprefix(root).lstrip("/") for file in listed}
            names = {f: name for f, name in names.items() if any(fnmatch.fnmatch(name.rpartition("/")[2], p) for p in patterns)}
            names = {file: name for file, name in names.items() if not _hidden(name)}
        found = [(fs.unstrip_protocol(file), names[file], told) for file, told in listed.items() if file in names]
    return [Piece(file, name, told["size"] or 0, _modified(told)) for file, name, told in found if told["type"] == "file"]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _modified(told: dict[str, Any]) -> str:
    """What a store tells of a version of a file: each calls it by another name."""
    return next((str(told[key]) for key in ("etag", "ETag", "blob_id", "mtime", "LastModified", "created") if told.get(key)), "")


def _file_system(path: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise missing("fsspec", f"{path!r}") from None
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ConfigError(f'cannot read {path!r}: {error}: pip install -e ".[data]" has gcsfs and s3fs', FIELD) from None
    except ValueError as error:
        raise ConfigError(f"cannot read {path!r}: {error}", FIELD) from None


@contextlib.contextmanager
def _sentences(path: str) -> Iterator[None]:
    """What goes wrong far away has a class of its own in every library: a sentence of all."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"cannot read {path!r}: {told}", FIELD) from None


@contextlib.contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """The decompressed content of a file as a stream. Raises `ConfigError` where it cannot be opened, or is cut off or damaged."""
    if is_remote(path):
        fs, inside = _file_system(path)
        with _sentences(path):
            raw = io.BufferedReader(fs.open(inside, "rb"), 1 << 20)
    else:
        raw = open(path, "rb")
    with raw, _decompressed(raw, path) as stream:
        try:
            yield stream
        except ConfigError:
            raise
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and not is_remote(path):
                raise
            raise ConfigError(f"is damaged or cut off: {error}", path) from None
        except Exception as error:
            if not is_remote(path):
                raise
            raise ConfigError(f"cannot be read to its end: {' '.join(str(error).split())}", path) from None


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    """Python's and Arrow's decoders raise where a file ends early; the one of `zstandard` ends without a word."""
    kind = next((kind for suffix, kind in COMPRESSED.items() if path.endswith(suffix)), None)
    if kind == "gzip":
        import gzip

        return io.BufferedReader(gzip.open(raw), 1 << 20)
    if kind == "bz2":
        import bz2

        return bz2.open(raw)
    if kind == "zstd":
        try:
            import pyarrow
        except ImportError:
            raise missing("pyarrow", repr(path)) from None
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
    return raw


def local_copy(path: str) -> str:
    """The path of a file for a library that reads local files only: itself, or a temporary copy of what lies elsewhere."""
    if not is_remote(path):
        return path
    _file_system(path)
    import fsspec

    with _sentences(path):
        return fsspec.open_local(f"simplecache::{path}", mode="rb")


def parsed(raw: bytes, where: str) -> Any:
    """The value of a line of JSON. Raises `ConfigError` for none, and for what Python does not read: an integer of 5,000 digits."""
    text = utf8(raw, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        zeros = f", with NUL bytes from byte {raw.find(0)} on: was it written to its end?" if 0 in raw else ""
        raise ConfigError(f"is not JSON: {error}{zeros}", where) from None


def utf8(content: bytes, where: str) -> str:
    """Decoded text. Raises `ConfigError` with the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 at byte {error.start} ({content[error.start]:#04x}): convert it, e.g. with iconv -t UTF-8", where
        ) from None
