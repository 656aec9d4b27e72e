"""How an array of ours lies in a tensor on disk: one reshaping, selection and transposition, to be read by slices and inverted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """The tensor's axes are split into `factors`; each of our axes is one of them (`order`, counted through all axes).

    fixed: factor → the place in it where ours lies, for tensors that hold several arrays. shuffled: factor → for each of our
    entries its place on disk.
    """

    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    fixed: dict[int, int] = field(default_factory=dict)
    shuffled: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(math.prod(sizes) for sizes in self.factors)

    @property
    def _sizes(self) -> list[int]:
        return [size for sizes in self.factors for size in sizes]

    def read(self, fetch: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """Ours at `index` (slices with step 1), of a tensor of which `fetch` gives slices; no more is fetched than has to be."""
        cuts = self._cuts(index)
        wanted = [slice(0, n) if f in self.shuffled else cut for f, (n, cut) in enumerate(zip(self._sizes, cuts, strict=True))]
        block, extents, within = [], [], []
        for sizes in self.factors:
            bounds, inner = _contiguous(sizes, wanted[len(extents) : len(extents) + len(sizes)])
            block.append(bounds)
            extents += [extent for extent, _ in inner]
            within += [cut for _, cut in inner]
        found = fetch(tuple(block)).reshape(extents)
        for factor, places in self.shuffled.items():
            found, within[factor] = found.take(np.array(places), factor), cuts[factor]
        found = found[tuple(cut.start if factor in self.fixed else cut for factor, cut in enumerate(within))]
        return found.transpose(self._transposed())

    def _cuts(self, index: Index) -> list[slice]:
        """For each factor the slice that is asked for."""
        cuts = [slice(self.fixed.get(f, 0), self.fixed.get(f, 0) + 1) for f in range(len(self._sizes))]
        for factor, part in zip(self.order, index, strict=True):
            start, stop, _ = part.indices(self._sizes[factor])
            cuts[factor] = slice(start, stop)
        return cuts

    def _transposed(self) -> list[int]:
        """Our axes as places among the factors that are not fixed."""
        free = [f for f in range(len(self._sizes)) if f not in self.fixed]
        return [free.index(factor) for factor in self.order]

    def write(self, tensor: np.ndarray, ours: np.ndarray) -> None:
        """Puts ours where it lies in the tensor."""
        place = tuple(self.fixed.get(f, slice(None)) for f in range(len(self._sizes)))
        target = tensor.reshape(self._sizes)[place]
        laid = ours.transpose(np.argsort(self._transposed()))
        if not self.shuffled:
            target[...] = laid
            return
        ((factor, places),) = self.shuffled.items()
        axis = factor - sum(f < factor for f in self.fixed)
        target[(slice(None),) * axis + (np.array(places),)] = laid


def _contiguous(sizes: tuple[int, ...], wanted: list[slice]) -> tuple[slice, list[tuple[int, slice]]]:
    """The slice of a tensor's axis that holds what is wanted of its factors; of each factor its extent in there and the cut."""
    start, inner, last = 0, math.prod(sizes), len(sizes) - 1
    lead = next((f for f, part in enumerate(wanted) if part.stop - part.start != 1), last)
    for size, part in zip(sizes[: lead + 1], wanted, strict=False):
        inner //= size
        start += part.start * inner
    extent = wanted[lead].stop - wanted[lead].start
    cuts = [(1, slice(0, 1))] * lead + [(extent, slice(0, extent))] + list(zip(sizes[lead + 1 :], wanted[lead + 1 :], strict=True))
    return slice(start, start + extent * inner), cuts


# ── the usual ones, from the shape of our array ──────────────────────────────────────────────────────────────────────
def same(shape: tuple[int, ...]) -> Layout:
    """The tensor is the array."""
    return Layout(tuple((n,) for n in shape), tuple(range(len(shape))))


def flat(inputs: int) -> Callable[[tuple[int, ...]], Layout]:
    """A matrix `[inputs, outputs]` of ours `[*inputs, *outputs]`; with no inputs a vector."""

    def layout(shape: tuple[int, ...]) -> Layout:
        groups = (shape[:inputs], shape[inputs:]) if inputs else (shape,)
        return Layout(groups, tuple(range(len(shape))))

    return layout


def transposed(inputs: int) -> Callable[[tuple[int, ...]], Layout]:
    """A matrix `[outputs, inputs]`, as PyTorch keeps it, of ours `[*inputs, *outputs]`."""

    def layout(shape: tuple[int, ...]) -> Layout:
        outputs = len(shape) - inputs
        return Layout((shape[inputs:], shape[:inputs]), (*range(outputs, outputs + inputs), *range(outputs)))

    return layout


def part(layout: Callable[[tuple[int, ...]], Layout], axis: int, place: int, count: int, before: int = 0):
    """Like `layout`, but the tensor's `axis` holds `count` arrays, ours being number `place`, after `before` of its factors."""

    def fused(shape: tuple[int, ...]) -> Layout:
        plain = layout(shape)
        factor = sum(len(sizes) for sizes in plain.factors[:axis]) + before
        sizes = plain.factors[axis]
        factors = (*plain.factors[:axis], (*sizes[:before], count, *sizes[before:]), *plain.factors[axis + 1 :])
        return Layout(factors, tuple(f + (f >= factor) for f in plain.order), {factor: place})

    return fused


def shuffled(layout: Callable[[tuple[int, ...]], Layout], factor: int, places: Callable[[int], tuple[int, ...]]):
    """Like `layout`, with the entries of a factor in another order on disk: `places(size)` says where each of ours is."""

    def mixed(shape: tuple[int, ...]) -> Layout:
        plain = layout(shape)
        size = [n for sizes in plain.factors for n in sizes][factor]
        return Layout(plain.factors, plain.order, plain.fixed, {factor: places(size)})

    return mixed
