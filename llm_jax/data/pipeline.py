"""From token stores to batches, in an order that is a function of seed and step alone, whoever reads it.

Where weights of a mixture change, or epochs of a source end, also of the length of training, since that is what they mean.

The unit that grain iterates over is a whole dispatch of batches, gathered by vectorised numpy: at 64-token windows grain's own
shuffle and batch cost 50 µs a window, a fifth of a core at the speed that small models eat them. A dispatch depends on no other,
so any host makes its own rows of any of them, and an iterator's state is a number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from llm_jax.core.config import Config, ConfigError, require_positive
from llm_jax.core.types import Batch
from llm_jax.data.apportion import Apportionment
from llm_jax.data.corpora import Corpus, Split, StandardLibrary
from llm_jax.data.first_fit import ranges
from llm_jax.data.packing import ConcatThenSplit, First, Packing, Rows
from llm_jax.data.shuffle import shuffled
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizers import Fitted

SHOWN = 32  # ids of a row that an excerpt is made of


@dataclass(frozen=True)
class Data(Config):
    """What is trained on, and in what pieces.

    sequence_length: tokens a row; batch_size: rows a step, over all devices; packing: how documents become rows.
    """

    corpus: Corpus = field(default_factory=StandardLibrary)
    sequence_length: int = 128
    batch_size: int = 16
    packing: Packing = field(default_factory=ConcatThenSplit)

    def validate(self):
        require_positive(self, "sequence_length", "batch_size")
        self.corpus.check(self.sequence_length)


def rows_of(data: Data, tokenizer: Fitted, split: Split | str, cache: str | os.PathLike, *, times: int = 1) -> list[Rows]:
    """The rows of a split, of each corpus in it, `times` as long as they are in training. Raises what reading the text raises."""
    found = []
    for member in data.corpus.members(split):
        tokens = tokenize(member.corpus, tokenizer, member.split, cache)
        rows = data.packing.rows(tokens, times * data.sequence_length, cache)
        found.append(rows if member.rows is None else First(rows, member.rows))
    return found


@dataclass(frozen=True)
class Host:
    """Which rows of every batch a process makes: `own` of `count` equal blocks. Together they make all, some maybe twice."""

    own: tuple[int, ...] = (0,)
    count: int = 1

    def part(self, rows: int) -> np.ndarray:
        """Which of so many rows are its own, in order. Raises `ConfigError` where they do not divide."""
        if rows % self.count:
            raise ConfigError(f"must be a multiple of the {self.count} blocks that hosts make, got {rows}", "data.batch_size")
        return np.arange(rows).reshape(self.count, -1)[list(self.own)].reshape(-1)

    def place(self, rows: slice, of: int) -> slice:
        """Where among its own rows those are that lie within one of its blocks of a batch of so many."""
        size = of // self.count
        start, stop, _ = rows.indices(of)
        block = start // size
        at = self.own.index(block) * size - block * size
        return slice(at + start, at + stop)


@dataclass(frozen=True)
class Origin:
    """Where a row of a batch comes from: number of the source, its row, the documents (by number in the split) it is of.

    ids `[SHOWN]`, at most: those it begins with.
    """

    source: int
    row: int
    documents: tuple[int, ...]
    ids: np.ndarray


@dataclass(frozen=True)
class Dispatches:
    """A random-access source whose item i is everything that dispatch `first + i` of the program eats: `[seeds, steps, B, L]`.

    sources: the rows of every source; turns: whose turn it is; batch: rows of a step, of which those of `host` are made.
    """

    sources: tuple[Rows, ...]
    turns: Apportionment
    batch: int
    seeds: tuple[int, ...]
    steps: int
    host: Host = Host()
    first: int = 0

    def __len__(self) -> int:
        return 2**62 // (self.steps * self.batch)

    def __getitem__(self, item: int) -> Batch:
        size = self.steps * self.batch
        turns = self.turns.turns((self.first + item) * size, (self.first + item + 1) * size)
        whose, which = (x.reshape(self.steps, self.batch)[:, self.host.part(self.batch)] for x in turns)
        present = [number for number in range(len(self.sources)) if (whose == number).any()]
        if len(present) == 1:
            found = self._rows(present[0], which.ravel())
            return jax.tree.map(lambda array: array.reshape(len(self.seeds), *which.shape, -1), found)
        places = [np.nonzero(whose == number) for number in present]
        parts = [self._rows(number, which[at]) for number, at in zip(present, places, strict=True)]

        def woven(*arrays: np.ndarray) -> np.ndarray:
            found = np.empty((len(self.seeds), *whose.shape, arrays[0].shape[-1]), arrays[0].dtype)
            for (step, row), array in zip(places, arrays, strict=True):
                found[:, step, row] = array
            return found

        return jax.tree.map(woven, *parts)

    def origins(self, step: int, seed: int) -> list[Origin]:
        """Where the rows of the batch of a step (from 0) come from, in their order, on all hosts."""
        whose, which = self.turns.turns(step * self.batch, (step + 1) * self.batch)
        return [self._origin(int(number), int(one), seed) for number, one in zip(whose, which, strict=True)]

    def _origin(self, number: int, one: int, seed: int) -> Origin:
        rows = self.sources[number]
        row = int(shuffled(np.array([one]), len(rows), seed + (number << 32))[0])
        begins, sizes = rows.stretches(row)
        first, last = (np.searchsorted(rows.tokens.starts, at, side="right") - 1 for at in (begins, begins + sizes - 1))
        documents = ranges(first, last - first + 1)[0]
        return Origin(number, row, tuple(documents.tolist()), rows.tokens.runs(begins[:1], np.minimum(sizes[:1], SHOWN)))

    def _rows(self, number: int, which: np.ndarray) -> Batch:
        """`[seeds, n, L]`: rows of a source, the examples `which` `[n]` of each seed's own order."""
        rows = self.sources[number]
        return rows.gather(np.stack([shuffled(which, len(rows), seed + (number << 32)) for seed in self.seeds]))


def dispatches(
    data: Data, sources: Sequence[Rows], *, seeds: Sequence[int], steps_per_item: int, steps: int, host: Host = Host()
) -> Dispatches:
    """All that training for so many steps eats, and of it what `host` makes.

    Raises `ConfigError` where a source has no row, they do not last, or hosts cannot share a batch.
    """
    host.part(data.batch_size)
    for rows in sources:
        if len(rows) < 1:
            raise ConfigError(
                f"must be < {len(rows.tokens)}, all the tokens of the {rows.tokens.split} split, got {data.sequence_length}: "
                "use a larger corpus or shorter sequences",
                "data.sequence_length",
            )
    turns = data.corpus.apportioned([len(rows) for rows in sources], steps * data.batch_size)
    return Dispatches(tuple(sources), turns, data.batch_size, tuple(seeds), steps_per_item, host)


def feed(source: Dispatches, *, start_step: int = 0, workers: int = 0) -> Iterator[Batch]:
    """Batches `[seeds, steps, B, L]` of host arrays without end.

    Row r of step s is the same for a seed whatever the others are, however steps are grouped, and however many hosts there are.
    They are made ahead of time, by a thread, or by so many `workers`, processes. The iterator is grain's: without workers
    `get_state()` is `{"next_index": n}`, from `start_step` on, and `set_state` resumes exactly.
    """
    import grain

    if start_step % source.steps:
        raise ValueError(f"start_step={start_step} must be a multiple of steps={source.steps}")
    source = replace(source, first=start_step // source.steps)
    items = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return iter(items) if workers == 0 else _by_workers(items, workers)


def _by_workers(items, workers: int) -> Iterator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain hands the flags on to its processes
        flags.FLAGS.mark_as_parsed()
    return iter(items.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)))


def evaluation_batches(
    sources: Sequence[Rows], *, batch: int, byte_lengths: np.ndarray, limit_bytes: int | None, host: Host = Host()
) -> Batch:
    """The first rows of all sources in order, `[n, batch, length]`; at most about `limit_bytes` of text, as much of each source.

    byte_lengths `[V]`: bytes that each id stands for, so that every tokenizer is scored on the same text.

    The last batch is filled up with rows of weight 0. Raises `ConfigError` where a source has no row at all.
    """
    limit = None if limit_bytes is None else limit_bytes // len(sources)
    found = _joined([_first_rows(rows, byte_lengths, limit) for rows in sources])
    count = len(found.tokens)
    missing = -count % batch
    weights = np.ones(found.targets.shape, np.float32) if found.weights is None else np.asarray(found.weights)
    filled = jax.tree.map(lambda array: np.concatenate([array, array[-1:].repeat(missing, 0)]), found)
    filled = replace(filled, weights=np.pad(weights, ((0, missing), (0, 0))))
    return jax.tree.map(lambda array: array.reshape(-1, batch, array.shape[-1])[:, host.part(batch)], filled)


def _first_rows(rows: Rows, byte_lengths: np.ndarray, limit: int | None) -> Batch:
    """`[n, length]`: the first rows of about so many bytes of text; all without a limit, one at least."""
    if len(rows) < 1:
        raise ConfigError(
            f"has only {len(rows.tokens)} tokens in its {rows.tokens.split} split, and evaluation needs sequences of "
            f"{rows.length}: use a larger corpus, shorter sequences or smaller evaluation.lengths",
            "data.corpus",
        )
    if limit is None:
        return rows.gather(np.arange(len(rows)))
    kept, room, at = [], float(limit), 0
    while at < len(rows):
        # twice as many ids hold that much text: only the ends of documents, and padding, have no byte
        part = rows.gather(np.arange(at, min(at + int(2 * room) // rows.length + 1, len(rows))))
        text = byte_lengths[part.targets].astype(np.float64)
        if part.segments is not None:
            text[part.segments < 0] = 0
        filled = np.cumsum(text.sum(-1))
        held = int(np.searchsorted(filled, room, side="right"))
        kept.append(jax.tree.map(lambda array, held=held: array[:held], part))
        if held < len(filled):
            break
        room, at = room - filled[-1], at + len(filled)
    found = _joined(kept)
    return found if len(found.tokens) else rows.gather(np.arange(1))


def _joined(parts: Sequence[Batch]) -> Batch:
    """Batches `[n, …]` one after another."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
