"""The embedded default corpus: text that is on every machine, without a download."""

from __future__ import annotations

import ast
import functools
import hashlib
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import Literal

from llm_jax.core.config import ConfigError, require_positive
from llm_jax.data.corpus import Corpus, by_name, share

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
    megabytes: only the first of the files, in an order that depends on their names' hashes; None is all (about 12). Those of test
    and validation come first, so less text is less to train on, until a tenth is left. kind: the sources alone ("code"), or the
    language reference alone ("prose", about 0.5 megabytes).
    """

    megabytes: float | None = None
    kind: Literal["all", "code", "prose"] = "all"

    def validate(self):
        require_positive(self, "megabytes")

    def named(self):
        room = float("inf") if self.megabytes is None else self.megabytes * 1e6
        for name, text in _standard_library():
            if room <= 0:
                return
            if self.kind != "all" and name.startswith(TOPICS) != (self.kind == "prose"):
                continue
            text = text if len(text) <= room else text[: int(room)]
            room -= len(text.encode())
            yield name, text

    def part(self, name, text, split):
        return text if by_name(name, 0.05, 0.05) == split else ""


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
    return tuple(sorted((item for item in unique.values() if item[1].strip()), key=lambda item: share(item[0])))


def _topics(file: pathlib.Path) -> list[tuple[str, str]]:
    """The language reference's chapters, out of the one big literal they are kept in."""
    if not file.is_file():
        return []
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []
