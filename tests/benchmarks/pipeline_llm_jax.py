"""Our side of `pipeline.py`: `prepare`, and `feed` on what it wrote."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Tokens a row, rows a batch, and batches a dispatch of ours."""

    length: int
    batch: int
    steps: int


class Ours:
    """Works in a folder that has the text, text.jsonl, in it. tokenizer: as it is written in an experiment file."""

    def __init__(self, folder: pathlib.Path, tokenizer: str, shape: Shape):
        from llm_jax.core.written import parse
        from llm_jax.data.corpora import Jsonl, Prepared
        from llm_jax.data.pipeline import Data
        from llm_jax.data.tokenizer_json import HuggingFace
        from llm_jax.data.tokenizers import Tokenizer
        from llm_jax.io import tokenizer_json

        self.shape, self.cache, self.out = shape, folder / "cache", folder / "prepared"
        self.text = Jsonl(path=str(folder / "text.jsonl"), valid_fraction=0.0, test_fraction=0.0)
        tokenizer_json.save(parse(tokenizer, Tokenizer, "--tokenizer").fit(self.text, self.cache), folder / "tokenizer")
        self.tokenizer = HuggingFace(path=str(folder / "tokenizer"))
        self.fitted = self.tokenizer.fit(self.text, self.cache)
        prepared = Prepared(path=str(self.out))
        self.data = Data(corpus=prepared, sequence_length=shape.length, batch_size=shape.batch)

    def tokenize(self) -> int:
        """Text to files; their tokens."""
        from llm_jax.data.prepare import prepare

        made = prepare(self.text, self.tokenizer, self.out, cache=self.cache, workers=1)
        return made["splits"]["train"]["tokens"]

    def discard(self) -> None:
        """Takes the files away again."""
        shutil.rmtree(self.out, ignore_errors=True)

    def batches(self, seed: int) -> Iterator:
        """An epoch, less what does not fill a dispatch, [1, steps, B, L] each."""
        from llm_jax.data.pipeline import dispatches, feed, rows_of

        rows = rows_of(self.data, self.fitted, "train", self.cache)
        count = len(rows[0]) // (self.shape.batch * self.shape.steps)
        source = dispatches(self.data, rows, seeds=[seed], steps_per_item=self.shape.steps, steps=count * self.shape.steps)
        items = feed(source)
        for _ in range(count):
            yield next(items)

    def epoch(self, seed: int) -> int:
        """Reads it, each array as one block of memory; its tokens."""
        import numpy as np

        found = 0
        for batch in self.batches(seed):
            for array in (batch.tokens, batch.targets, batch.weights, batch.segments, batch.positions):
                np.ascontiguousarray(array)
            found += batch.tokens.size
        return found
