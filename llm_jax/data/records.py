"""Corpora of files in which every document is a record: JSON lines, Parquet rows, ArrayRecord, a dataset of Hugging Face's."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_jax.core.config import ConfigError, require, require_fraction
from llm_jax.data import files
from llm_jax.data.corpus import Corpus, Piece, by_name

ROWS = 256  # read at a time: what is in memory of a table


@dataclass(frozen=True)
class Records(Corpus):
    """Files of documents, `path` as `files.find` takes it: local or remote, a file, a folder or a pattern.

    A document goes to a split by the hash of its name, "file:number", in fractions of about valid_fraction and test_fraction.
    bad: a record that is none, has no text under `field`, or text that is no Unicode, is "fatal", or left out and counted ("skip").
    """

    abstract = True
    path: str = ""
    field: str = "text"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    bad: Literal["fatal", "skip"] = "fatal"

    def validate(self):
        require(bool(self.path), "path", "is missing: name a file, a folder or a pattern")
        require_split(self)

    def part(self, name, text, split):
        return text if by_name(name, self.valid_fraction, self.test_fraction) == split else ""

    def text(self, value: Any, where: str) -> str | ConfigError:
        """The value as text, or what is wrong with it."""
        if not isinstance(value, str):
            return ConfigError(f"has no text under {self.field!r}: set data.corpus.field to the name it has", where)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return ConfigError("has half a surrogate pair, which is no text: remove the line or repair its escapes", where)
        return value

    def json(self, raw: bytes, where: str) -> str | ConfigError:
        """The text under `field` of a JSON object, or what is wrong with it."""
        try:
            record = files.parsed(raw, where)
        except ConfigError as error:
            return error
        return self.text(record.get(self.field) if isinstance(record, dict) else None, where)


def require_split(corpus: Any) -> None:
    """Raises `ConfigError` unless valid_fraction and test_fraction leave something to train on."""
    require_fraction(corpus, "valid_fraction", "test_fraction")
    left = 1 - corpus.valid_fraction - corpus.test_fraction
    require(left > 0, "valid_fraction", "and test_fraction leave nothing to train on: lower them")


@dataclass(frozen=True)
class Jsonl(Records):
    """JSON lines (`*.jsonl`, also .gz, .bz2, .zst): each line is a document, its text under `field`.

    A large local file that is not compressed is read by several processes at once.
    """

    def pieces(self, size=None):
        found = files.find(self.path, files.with_compressed("*.jsonl"))
        whole = size is None
        return [part for piece in found for part in ([piece] if whole or not _can_be_cut(piece, size) else _cut(piece, size))]

    def read(self, piece):
        with files.reading(piece.file) as lines:
            lines.seek(piece.start) if piece.start else None
            left = float("inf") if piece.stop is None else piece.stop - piece.start
            for number, raw in enumerate(lines, piece.first + 1):
                if raw.strip():
                    yield f"{piece.name}:{number}", self.json(raw, f"{piece.file}, line {number},")
                left -= len(raw)
                if left <= 0:
                    return


def _can_be_cut(piece: Piece, size: int) -> bool:
    return piece.size > size and not files.is_remote(piece.file) and not piece.file.endswith(tuple(files.COMPRESSED))


def _cut(piece: Piece, size: int) -> list[Piece]:
    """A file of lines in parts that begin and end with a line; lines are counted, because documents are named by them."""
    found, start, first = [], 0, 0
    at = line = 0
    with open(piece.file, "rb") as content:
        while block := content.read(min(size, 1 << 20)):
            if at + len(block) - start >= size and (end := block.rfind(b"\n") + 1):
                found.append(replace(piece, size=at + end - start, start=start, stop=at + end, first=first))
                start, first = at + end, line + block.count(b"\n")
            at, line = at + len(block), line + block.count(b"\n")
    if start < at:
        found.append(replace(piece, size=at - start, start=start, stop=at, first=first))
    return found


@dataclass(frozen=True)
class Parquet(Records):
    """Parquet files (`*.parquet`): each row is a document, its text in the column `field`. Row groups are read one at a time."""

    def pieces(self, size=None):
        return [part for piece in files.find(self.path, ["*.parquet"]) for part in self._groups(piece, size)]

    def _groups(self, piece: Piece, size: int | None) -> list[Piece]:
        """Runs of row groups of about `size` bytes each; start and stop are numbers of row groups, first is the rows before."""
        if size is None:
            return [piece]
        found, start, rows, first, room = [], 0, 0, 0, 0
        with files.reading(piece.file) as raw:
            metadata = self._open(raw, piece.file).metadata
            for group in range(metadata.num_row_groups):
                told = metadata.row_group(group)
                rows, room = rows + told.num_rows, room + told.total_byte_size
                if room >= size or group == metadata.num_row_groups - 1:
                    found.append(replace(piece, size=room, start=start, stop=group + 1, first=first))
                    start, first, room = group + 1, rows, 0
        return found

    def read(self, piece):
        with files.reading(piece.file) as raw:
            table, number = self._open(raw, piece.file), piece.first
            groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
            for batch in _damage(table.iter_batches(ROWS, row_groups=list(groups), columns=[self.field]), piece.file):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{piece.name}:{number}", self.text(value, f"{piece.file}, row {number},")

    def _open(self, raw: Any, where: str) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            raise files.missing("pyarrow", "Parquet") from None
        try:
            table = pyarrow.parquet.ParquetFile(raw, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"is no Parquet file, or cut off: {error}", where) from None
        names = table.schema_arrow.names
        if self.field not in names:
            raise ConfigError(f"has no column {self.field!r}: set data.corpus.field to one of {', '.join(names)}", where)
        return table


def _damage(batches: Iterator[Any], where: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"is damaged: {error}", where) from None


@dataclass(frozen=True)
class ArrayRecord(Records):
    """ArrayRecord files (`*.array_record`, `*.arrayrecord`), grain's own format: each record is a document.

    A record is a JSON object with its text under `field`, or the text itself where `field` is empty.
    """

    field: str = ""

    def pieces(self, size=None):
        found = files.find(self.path, ["*.array_record", "*.arrayrecord", "*.array_record-*"])
        if size is None:
            return found
        parts = []
        for piece in found:
            count = self._open(piece).num_records()
            step = max(count * size // max(piece.size, 1), ROWS)
            for at in range(0, count, step):
                stop = min(at + step, count)
                parts.append(replace(piece, size=piece.size * (stop - at) // count, start=at, stop=stop))
        return parts

    def read(self, piece):
        reader = self._open(piece)
        stop = reader.num_records() if piece.stop is None else piece.stop
        for at in range(piece.start, stop, ROWS):
            try:
                found = reader.read(at, min(at + ROWS, stop))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"is damaged after record {at}: {error}", piece.file) from None
            for number, raw in enumerate(found, at + 1):
                yield f"{piece.name}:{number}", self._text(raw, f"{piece.file}, record {number},")

    def _text(self, raw: bytes, where: str) -> str | ConfigError:
        if self.field:
            return self.json(raw, where)
        try:
            return files.utf8(raw, where)
        except ConfigError as error:
            return error

    def _open(self, piece: Piece) -> Any:
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError:
            raise files.missing("array_record", "ArrayRecord") from None
        try:
            reader = ArrayRecordReader(files.local_copy(piece.file))
            count = reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"is no ArrayRecord file, or cut off: {error}", piece.file) from None
        if not count:  # the library takes any file, and finds nothing in one that is damaged
            raise ConfigError("has no records: it is no ArrayRecord file, is empty, or was cut off", piece.file)
        return reader


@dataclass(frozen=True)
class HuggingFace(Records):
    """A dataset of Hugging Face's: a folder that `save_to_disk` wrote, or a name on the hub, downloaded once to its cache.

    rows: the dataset's own split that is read, divided again here like any corpus; subset: its configuration; revision: a commit,
    tag or branch of the hub, which should be named for results that others can repeat. Files on the hub that no loading is needed
    for are also read as `Parquet(path="hf://datasets/user/name/…")`.
    """

    rows: str = "train"
    subset: str | None = None
    revision: str | None = None

    def pieces(self, size=None):
        dataset = _loaded(self)
        count, room = len(dataset), dataset.data.nbytes
        whole = Piece(self.path, pathlib.Path(self.path).name, room, str(dataset._fingerprint))
        step = max(count if size is None else count * size // max(room, 1), ROWS)
        return [
            replace(whole, size=room * (min(at + step, count) - at) // count, start=at, stop=min(at + step, count))
            for at in range(0, count, step)
        ]

    def read(self, piece):
        dataset = _loaded(self).select(range(piece.start, piece.stop))
        number = piece.start
        for batch in dataset.select_columns([self.field]).with_format(None).iter(ROWS):
            for value in batch[self.field]:
                number += 1
                yield f"{piece.name}:{number}", self.text(value, f"{self.path}, row {number},")


@functools.lru_cache(4)
def _loaded(corpus: HuggingFace) -> Any:
    """The dataset, mapped from its Arrow files."""
    try:
        import datasets
    except ImportError:
        raise files.missing("datasets", "a dataset of Hugging Face's") from None
    folder = pathlib.Path(corpus.path).expanduser()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        found = datasets.load_from_disk(str(folder)) if saved else None
        if found is None:
            found = datasets.load_dataset(corpus.path, corpus.subset, split=corpus.rows, revision=corpus.revision)
    except Exception as error:  # the hub's, Arrow's, the library's, the network's
        told = "it has no rows" if saved and isinstance(error, IndexError) else " ".join(str(error).split())
        raise ConfigError(f"cannot be loaded: {told}", repr(corpus.path)) from None
    if isinstance(found, dict):
        if corpus.rows not in found:
            raise ConfigError(f"is none of {corpus.path!r}: it has {', '.join(found)}", "data.corpus.rows")
        found = found[corpus.rows]
    if corpus.field not in found.column_names:
        columns = ", ".join(found.column_names)
        raise ConfigError(f"is no column of {corpus.path!r}: it has {columns}", "data.corpus.field")
    return found
