"""Every corpus, to import from: the embedded default, text files, records, what `prepare` wrote, synthetic tasks, mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_jax.core.config import require
from llm_jax.data import files
from llm_jax.data.corpus import Corpus, Piece, Split, by_name
from llm_jax.data.mixture import Mixture, Source
from llm_jax.data.prepared import Prepared
from llm_jax.data.records import ArrayRecord, HuggingFace, Jsonl, Parquet, require_split
from llm_jax.data.standard_library import StandardLibrary
from llm_jax.data.tasks import Recall

__all__ = [
    "ArrayRecord", "Corpus", "HuggingFace", "Jsonl", "Mixture", "Parquet", "Piece", "Prepared", "Recall", "Source", "Split",
    "StandardLibrary", "TextFiles",
]  # fmt: skip


@dataclass(frozen=True)
class TextFiles(Corpus):
    """UTF-8 text: a file, a folder (its `*.txt`, at any depth, also .gz, .bz2, .zst) or a glob pattern; each file is one document.

    path: local or an address (gs://, s3://, hf://, …). split: "tail" takes the last fractions of every document for validation
    and test, "file" takes whole files.
    """

    path: str = ""
    split: Literal["tail", "file"] = "tail"
    valid_fraction: float = 0.1
    test_fraction: float = 0.0

    def validate(self):
        require(bool(self.path), "path", "is missing: name a file, a folder or a pattern")
        require_split(self)

    def pieces(self, size=None):
        return files.find(self.path, files.with_compressed("*.txt"))

    def read(self, piece):
        with files.reading(piece.file) as content:
            yield piece.name, files.utf8(content.read(), piece.file)

    def part(self, name, text, split):
        if self.split == "file":
            return text if by_name(name, self.valid_fraction, self.test_fraction) == split else ""
        train = int(len(text) * (1 - self.valid_fraction - self.test_fraction))
        valid = train + int(len(text) * self.valid_fraction) if self.test_fraction else len(text)
        bounds = {"train": (0, train), "valid": (train, valid), "test": (valid, len(text))}[split]
        return text[slice(*bounds)]
