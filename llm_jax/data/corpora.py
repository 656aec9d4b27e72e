"""Where text comes from: the embedded default, text files, JSON lines; split once into train, valid and test."""

from __future__ import annotations

import ast
import functools
import glob
import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llm_jax.core.config import Config, ConfigError, require, require_fraction, require_positive

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Corpus(Config):
    """Documents of text. The order, the splits and the fingerprint are functions of the content alone."""

    abstract = True

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of more splits, each scored once training is done: as "valid/loss@name" and so on."""
        return ()

    def check(self, sequence_length: int) -> None:
        """Raises `ConfigError` where rows of so many tokens cannot be cut from it."""

    def named(self) -> Iterator[tuple[str, str]]:
        """Every document as (a name that is stable across machines, text). Raises `ConfigError` for unreadable input."""
        raise NotImplementedError

    def part(self, name: str, text: str, split: Split | str) -> str:
        """What of a document belongs to the split; empty for nothing."""
        raise NotImplementedError

    def documents(self, split: Split | str) -> Iterator[str]:
        """The documents of a split, or of one of `probes`. Raises `ConfigError` if the whole corpus is empty."""
        empty = True
        for name, text in self.named():
            empty = empty and not text
            chosen = self.part(name, text, split)
            if chosen:
                yield chosen
        if empty:
            raise ConfigError("is an empty corpus: there is no text in it", "data.corpus")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of everything that is in it, in order."""
        return _fingerprint(self)


@functools.cache
def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for name, text in corpus.named():
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _by_name(name: str, valid: float, test: float) -> Split:
    share = _share(name)
    return "test" if share < test else "valid" if share < test + valid else "train"


# ── the embedded default ─────────────────────────────────────────────────────────────────────────────────────────────
# not prose or code that a person wrote: tests, tables, build products, grammars; or not the standard library at all
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "encodings",
    "__phello__",
    "_pyrepl_tests",
}
GENERATED = {
    "keyword.py",
    "token.py",
    "opcode.py",
    "_opcode_metadata.py",
    "html/entities.py",
    "stringprep.py",
    "lib2to3/pgen2/token.py",
    "pydoc_data/topics.py",
}
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class StandardLibrary(Corpus):
    """The Python installation's own standard library: sources, and the language reference as `help()` shows it.

    It is on every machine, but differs between Python versions: its fingerprint is recorded with every result. Tests and
    generated tables are left out, copies are dropped, and 5% of the files each are for validation and test.
    megabytes: only the first of the files, in an order that depends on their names' hashes; None is all (about 12).
    """

    megabytes: float | None = None

    def validate(self):
        require_positive(self, "megabytes")

    def named(self):
        room = float("inf") if self.megabytes is None else self.megabytes * 1e6
        for name, text in _standard_library():
            if room <= 0:
                return
            text = text if len(text) <= room else text[: int(room)]
            room -= len(text.encode())
            yield name, text

    def part(self, name, text, split):
        return text if _by_name(name, 0.05, 0.05) == split else ""


@functools.cache
def _standard_library() -> tuple[tuple[str, str], ...]:
    """(relative path, text) of every file once, in the order of their names' hashes, so that any first part is a sample."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        name = relative.as_posix()
        if set(relative.parts[:-1]) & LEFT_OUT or name in GENERATED or name.startswith(("_sysconfigdata", "config-")):
            continue
        found.append((name, file.read_bytes().decode("utf-8", "replace")))
    found += [(f"{TOPICS}:{topic}", text) for topic, text in _topics(root / TOPICS)]
    if not found:
        raise ConfigError(
            f"finds no sources of the standard library in {root}: "
            "name another corpus, as in --set=data.corpus=\"TextFiles(path='text.txt')\"",
            "data.corpus",
        )
    unique: dict[str, tuple[str, str]] = {}
    for name, text in sorted(found):
        unique.setdefault(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), (name, text))
    return tuple(sorted((item for item in unique.values() if item[1].strip()), key=lambda item: _share(item[0])))


def _topics(file: pathlib.Path) -> list[tuple[str, str]]:
    """The language reference's chapters, out of the one big literal they are kept in."""
    if not file.is_file():
        return []
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class TextFiles(Corpus):
    """UTF-8 text: a file, a folder (its `*.txt`, at any depth) or a glob pattern; each file is one document.

    split: "tail" takes the last fractions of every document for validation and test, "file" takes whole files.
    """

    path: str = ""
    split: Literal["tail", "file"] = "tail"
    valid_fraction: float = 0.1
    test_fraction: float = 0.0

    def validate(self):
        _require_files(self)

    def named(self):
        for name, file in _files(self.path, "*.txt"):
            yield name, _utf8(file.read_bytes(), str(file))

    def part(self, name, text, split):
        if self.split == "file":
            return text if _by_name(name, self.valid_fraction, self.test_fraction) == split else ""
        train = int(len(text) * (1 - self.valid_fraction - self.test_fraction))
        valid = train + int(len(text) * self.valid_fraction) if self.test_fraction else len(text)
        bounds = {"train": (0, train), "valid": (train, valid), "test": (valid, len(text))}[split]
        return text[slice(*bounds)]


@dataclass(frozen=True)
class Jsonl(Corpus):
    """JSON lines: a file, a folder (its `*.jsonl`) or a glob pattern; each line is a document, its text under `field`."""

    path: str = ""
    field: str = "text"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05

    def validate(self):
        _require_files(self)

    def named(self):
        for name, file in _files(self.path, "*.jsonl"):
            with open(file, "rb") as lines:
                for number, raw in enumerate(lines, 1):
                    if raw.strip():
                        yield f"{name}:{number}", self._text(_utf8(raw, f"{file}, line {number},"), f"{file}, line {number},")

    def part(self, name, text, split):
        return text if _by_name(name, self.valid_fraction, self.test_fraction) == split else ""

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"is not JSON: {error}", where) from None
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"has no text under {self.field!r}: set data.corpus.field to the name it has", where)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError("has half a surrogate pair, which is no text: remove the line or repair its escapes", where) from None
        return text


def _require_files(corpus: TextFiles | Jsonl) -> None:
    require(bool(corpus.path), "path", "is missing: name a file, a folder or a pattern")
    require_fraction(corpus, "valid_fraction", "test_fraction")
    left = 1 - corpus.valid_fraction - corpus.test_fraction
    require(left > 0, "valid_fraction", "and test_fraction leave nothing to train on: lower them")


def _files(path: str, pattern: str) -> list[tuple[str, pathlib.Path]]:
    """(name relative to what was asked for, file), sorted. Raises `ConfigError` if there is none."""
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        found = [(file.relative_to(root).as_posix(), file) for file in root.rglob(pattern) if file.is_file()]
    elif root.is_file():
        found = [(root.name, root)]
    else:
        found = [(pathlib.Path(file).name, pathlib.Path(file)) for file in glob.glob(str(root), recursive=True)]
    if not found:
        raise ConfigError(
            f"finds no file at {path!r}: it may be a file, a folder with {pattern} in it, or a pattern", "data.corpus.path"
        )
    return sorted(found)


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 at byte {error.start} ({content[error.start]:#04x}): convert it, e.g. with iconv -t UTF-8", where
        ) from None
