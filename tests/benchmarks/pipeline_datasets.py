"""The other side of `pipeline.py`: `datasets` and `tokenizers` of Hugging Face, one process, in the ways that are quickest."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Settings:
    """A function of a batch of documents, and how many there are in it."""

    function: Callable[[dict], dict]
    documents: int

    def __str__(self) -> str:
        return f"{self.function.__name__} of {self.documents}"


class Theirs:
    """Works in a folder that has text.jsonl and tokenizer/tokenizer.json in it. end: the id after each document."""

    def __init__(self, folder: pathlib.Path, end: int, length: int, batch: int):
        import tokenizers

        self.folder, self.end, self.length, self.batch = folder, end, length, batch
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # as ours: text stays text
        self.quickest = {"tokenizing": Settings(self.arrays, 1000), "numpy": Settings(self.grouped_arrays, 1000)}
        self.quickest["run_clm"] = Settings(self.grouped_lists, 1000)

    def _mapped(self, dataset: Any, settings: Settings, name: str) -> Any:
        """What a function makes of a dataset, in a file of its own."""
        import datasets

        file = self.folder / f"{name}.arrow"
        file.unlink(missing_ok=True)
        return dataset.map(
            settings.function,
            batched=True,
            batch_size=settings.documents,
            remove_columns=dataset.column_names,
            features=datasets.Features({"ids": datasets.List(datasets.Value("int32"))}),
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint=f"{name}-{settings.documents}",  # otherwise the function is pickled for it
        )

    # ── tokenizing ───────────────────────────────────────────────────────────────────────────────────────────────────
    def lists(self, batch: dict) -> dict:
        """Ids of a batch of documents, as the library gives them."""
        return {"ids": [[*e.ids, self.end] for e in self.tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    def arrays(self, batch: dict) -> dict:
        """The same as arrays, which Arrow takes sooner."""
        return {"ids": [np.array(ids, np.int32) for ids in self.lists(batch)["ids"]]}

    def tokenize(self, settings: Settings | None = None) -> int:
        """Text to a file; its tokens."""
        import datasets

        cache = str(self.folder / "loaded")
        text = datasets.load_dataset("json", data_files=str(self.folder / "text.jsonl"), split="train", cache_dir=cache)
        made = self._mapped(text, settings or self.quickest["tokenizing"], "ids")
        return sum(len(chunk.values) for chunk in made.data.column("ids").chunks)

    def discard(self) -> None:
        """Takes the files away again."""
        shutil.rmtree(self.folder / "loaded", ignore_errors=True)
        (self.folder / "ids.arrow").unlink(missing_ok=True)

    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids, and where each document begins."""
        import datasets

        chunks = datasets.Dataset.from_file(str(self.folder / "ids.arrow")).data.column("ids").chunks
        sizes = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        return np.concatenate([chunk.values.to_numpy() for chunk in chunks]), np.cumsum(sizes) - sizes

    # ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def grouped_lists(self, batch: dict) -> dict:
        """run_clm.py's group_texts: one list after another, cut, the rest dropped."""
        joined = [i for ids in batch["ids"] for i in ids]
        whole = len(joined) // self.length * self.length
        return {"ids": [joined[i : i + self.length] for i in range(0, whole, self.length)]}

    def grouped_arrays(self, batch: dict) -> dict:
        """The same in NumPy."""
        joined = np.concatenate(batch["ids"])
        return {"ids": joined[: len(joined) // self.length * self.length].reshape(-1, self.length)}

    def packed(self, way: str, settings: Settings | None = None, name: str = "") -> Any:
        """The rows of a way, "numpy", "run_clm" or "arrow", of the ids on disk."""
        import datasets

        ids = datasets.Dataset.from_file(str(self.folder / "ids.arrow"))
        if way == "run_clm":
            return self._mapped(ids, settings or self.quickest[way], name or way)
        return self._mapped(ids.with_format("numpy", dtype="int32"), settings or self.quickest["numpy"], name or way)

    def batches(self, rows: Any, way: str, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """An epoch of rows, less what does not fill a batch."""
        kind = {"type": "arrow"} if way == "arrow" else {"type": "numpy", "dtype": "int32"}
        shuffled = rows.shuffle(seed=seed, keep_in_memory=True).with_format(**kind)
        for batch in shuffled.iter(self.batch, drop_last_batch=True):
            tokens = batch["ids"]
            if way == "arrow":
                tokens = tokens.combine_chunks().flatten().to_numpy().reshape(-1, self.length)
            yield described(tokens, self.end)

    def epoch(self, way: str, seed: int, rows: Any = None) -> int:
        """Reads it; its tokens."""
        rows = self.packed(way) if rows is None else rows
        return sum(batch["tokens"].size for batch in self.batches(rows, way, seed))


def described(tokens: np.ndarray, end: int) -> dict[str, np.ndarray]:
    """Tokens [B, L] with what else a batch has; the last target of a row, and those across documents, are -100."""
    ends = tokens == end
    segments, begins = np.zeros_like(tokens), np.zeros_like(tokens)
    np.cumsum(ends[:, :-1], 1, out=segments[:, 1:])
    places = np.arange(tokens.shape[1], dtype=np.int32)
    np.maximum.accumulate(np.where(ends[:, :-1], places[1:], 0), 1, out=begins[:, 1:])
    targets = np.full_like(tokens, -100)
    targets[:, :-1] = np.where(ends[:, :-1], -100, tokens[:, 1:])
    return {"tokens": tokens, "targets": targets, "segments": segments, "positions": places - begins}
