"""A shuffle of any size that is computed where it is asked for: nothing of it is stored."""

from __future__ import annotations

import numpy as np

ROUNDS = 4  # of the Feistel network; four make a pseudo-random permutation (Luby & Rackoff 1988)


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
    key = np.uint64((int(seed) % 2**63 * 0x9E3779B97F4A7C15 + (turn + 1) * 0xD1B54A32D192ED03) % 2**64)
    x = value + key + epoch.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
