"""From token stores to batches: windows in an order that is a function of seed and step alone, packed documents masked.

The unit that grain iterates over is a whole dispatch of batches, gathered by vectorised numpy: at 64-token windows grain's own
shuffle and batch cost 50 µs a window, a fifth of a core at the speed that small models eat them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_jax.core.config import Config, ConfigError, require_positive
from llm_jax.core.types import Batch
from llm_jax.data.corpora import Corpus, StandardLibrary
from llm_jax.data.store import Tokens

ROUNDS = 4  # of the Feistel network; four make a pseudo-random permutation (Luby & Rackoff 1988)


@dataclass(frozen=True)
class Data(Config):
    """What is trained on, and in what pieces.

    sequence_length: tokens a row; batch_size: rows a step, over all devices. Documents are packed one after another and cut
    into rows; with document_masks attention, positions and loss stay within documents, without they run across.
    """

    corpus: Corpus = field(default_factory=StandardLibrary)
    sequence_length: int = 128
    batch_size: int = 16
    document_masks: bool = True

    def validate(self):
        require_positive(self, "sequence_length", "batch_size")
        self.corpus.check(self.sequence_length)


def windows(tokens: Tokens, length: int) -> int:
    """How many rows of `length` tokens and their targets a store holds."""
    return max(len(tokens) - 1, 0) // length


def gather(tokens: Tokens, rows: np.ndarray, length: int, *, document_masks: bool) -> Batch:
    """The windows with the given numbers `[…]` as a batch `[…, length]` of int32."""
    at = rows[..., None].astype(np.int64) * length + np.arange(length + 1)
    ids = tokens.windows(at[..., 0], length + 1).astype(np.int32)
    if not document_masks:
        return Batch(ids[..., :-1], ids[..., 1:])
    document = np.searchsorted(tokens.starts, at, side="right")
    begins = np.maximum(tokens.starts[document[..., :-1] - 1], at[..., :1])
    weights = (document[..., 1:] == document[..., :-1]).astype(np.float32)
    segments = (document - document[..., :1])[..., :-1].astype(np.int32)
    return Batch(ids[..., :-1], ids[..., 1:], weights, segments, (at[..., :-1] - begins).astype(np.int32))


def shuffled(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where the examples with the given running numbers stand: every `size` of them are one epoch, a permutation of its own.

    Nothing is stored, so it costs the same for 10⁴ and 10¹² examples: a Feistel network over the next power of four, walked
    until it lands inside (Black & Rogaway 2002).
    """
    epoch, within = np.divmod(np.asarray(index, np.int64), size)
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    place = _feistel(within.astype(np.uint64), epoch, seed, half)
    outside = place >= size
    while outside.any():
        place[outside] = _feistel(place[outside], epoch[outside], seed, half)
        outside = place >= size
    return place.astype(np.int64)


def _feistel(value: np.ndarray, epoch: np.ndarray, seed: int, half: int) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = value >> np.uint64(half), value & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (_mixed(right, epoch, seed, turn) & mask)
    return (left << np.uint64(half)) | right


def _mixed(value: np.ndarray, epoch: np.ndarray, seed: int, turn: int) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014) of value, epoch, seed and round."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed % 2**63) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(turn + 1) * np.uint64(0xD1B54A32D192ED03)
        x = value + key + epoch.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Dispatches:
    """A random-access source whose item i is everything that dispatch i of the program eats: `[seeds, steps, B, L]`."""

    data: Data
    tokens: Tokens
    seeds: tuple[int, ...]
    steps: int

    def __len__(self) -> int:
        return 2**62 // (self.steps * self.data.batch_size)

    def __getitem__(self, item: int) -> Batch:
        data, per_item = self.data, self.steps * self.data.batch_size
        running = np.arange(item * per_item, (item + 1) * per_item)
        size = windows(self.tokens, data.sequence_length)
        rows = np.stack([shuffled(running, size, seed).reshape(self.steps, data.batch_size) for seed in self.seeds])
        return gather(self.tokens, rows, data.sequence_length, document_masks=data.document_masks)


def feed(data: Data, tokens: Tokens, *, seeds: Sequence[int], steps_per_item: int, start_step: int = 0) -> Iterator[Batch]:
    """Batches `[seeds, steps_per_item, B, L]` of host arrays without end, prefetched by a thread.

    Row r of step s is the same for a seed whatever the others are and however steps are grouped. The iterator is grain's:
    `get_state()` is `{"next_index": n}` and `set_state` resumes exactly. Raises `ConfigError` for too short a store.
    """
    import grain

    if windows(tokens, data.sequence_length) < 1:
        raise ConfigError(
            f"must be < {len(tokens)}, all the tokens of the {tokens.split} split, got {data.sequence_length}: "
            "use a larger corpus or shorter sequences",
            "data.sequence_length",
        )
    if start_step % steps_per_item:
        raise ValueError(f"start_step={start_step} must be a multiple of steps_per_item={steps_per_item}")
    source = Dispatches(data, tokens, tuple(seeds), steps_per_item)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
    iterator.set_state({"next_index": start_step // steps_per_item})
    return iterator


def evaluation_batches(
    data: Data, tokens: Tokens, *, length: int, batch: int, byte_lengths: np.ndarray, limit_bytes: int | None
) -> Batch:
    """The store's first windows of `length` tokens in order, `[n, batch, length]`; at most about `limit_bytes` of text.

    byte_lengths `[V]`: bytes that each id stands for, so that every tokenizer is scored on the same text.

    The last batch is filled up with rows of weight 0. Raises `ConfigError` if there is no window at all.
    """
    count = windows(tokens, length)
    if count < 1:
        raise ConfigError(
            f"has only {len(tokens)} tokens in its {tokens.split} split, and evaluation needs sequences of {length}: "
            "use a larger corpus, shorter sequences or smaller evaluation.lengths",
            "data.corpus",
        )
    if limit_bytes is not None:
        # twice as many ids hold that much text: only the ends of documents have no byte
        text = np.cumsum(byte_lengths[tokens.ids[1 : 2 * limit_bytes + 1]], dtype=np.float64)
        count = max(min(count, int(np.searchsorted(text, limit_bytes, side="right")) // length), 1)
    rows = np.arange(-(-count // batch) * batch)
    found = gather(tokens, np.minimum(rows, count - 1).reshape(-1, batch), length, document_masks=data.document_masks)
    weights = np.ones(found.targets.shape, np.float32) if found.weights is None else found.weights
    weights = weights * (rows < count).reshape(-1, batch, 1).astype(np.float32)
    return Batch(found.tokens, found.targets, weights, found.segments, found.positions)
