"""Many rows through a model, so that what a row is given depends on the row alone: not on the others, their number, or their order.

The last bits of a product of matrices depend on its shape. So a program's shape follows from the length that a row is padded to,
and from nothing else: it takes `rows_of` rows of that length, empty ones where there are fewer. One program is compiled for each
of the few lengths.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import BATCH
from llm_jax.core.platform import traits
from llm_jax.infer import forward
from llm_jax.infer.rows import Ids, pad, rounded
from llm_jax.models.model import Model, Params
from llm_jax.nn.moe import MoE


@dataclass(frozen=True)
class Request:
    """A row whose tokens from place `first` >= 1 on are scored; read: what an encoder reads for it."""

    row: Ids
    first: int
    read: Ids = ()


@dataclass(frozen=True)
class Scores:
    """Of one request: Σ log p of its scored tokens, in nats, and whether each of them is the most probable one."""

    log_p: float
    greedy: bool


def rows_of(model: Model, length: int, tokens: int) -> int:
    """How many rows of so many places a device takes at once: a power of two, about `tokens` in all.

    One where there are experts: their products are over the tokens that chose them, whosever they are.
    """
    if any(isinstance(layer.ffn, MoE) for stack in model.stacks.values() for layer in stack.in_full):
        return 1
    return 1 << max((tokens // length).bit_length() - 1, 0)


@dataclass(frozen=True)
class Scorer:
    """Scores requests as they come, holding no more of them than fill one program of each length.

    tokens: of the rows that a device takes at once, None for what suits the platform. Scores may differ in their last bits where it
    does, and nowhere else.
    """

    model: Model
    vocabulary: int
    params: Params
    tokens: int | None = None

    def __call__(self, requests: Iterable[Request]) -> Iterator[tuple[int, Scores]]:
        """(its number, its scores) of each request, in the order in which they are computed.

        Raises `ConfigError` for a log p that is not finite (`require_finite`).
        """
        waiting: dict[tuple[int, int], list[tuple[int, Request]]] = collections.defaultdict(list)
        running: collections.deque[tuple[list[int], forward.Scored]] = collections.deque()
        for number, request in enumerate(requests):
            shape = self._shape(request)
            waiting[shape].append((number, request))
            if len(waiting[shape]) == self._count(shape):
                running.append(self._start(shape, waiting.pop(shape)))
            while len(running) > 1:  # the next is prepared while one is computed
                yield from _finished(*running.popleft())
        for shape, rest in waiting.items():
            running.append(self._start(shape, rest))
            while len(running) > 1:
                yield from _finished(*running.popleft())
        while running:
            yield from _finished(*running.popleft())

    def _shape(self, request: Request) -> tuple[int, int]:
        """What the row, whose last token is not read, and what an encoder reads are padded to. Raises `ConfigError`."""
        first, last = next(iter(self.model.stacks.values())), self.model.final
        forward.check_length(last, len(request.row) - 1, "a row")
        row = rounded(len(request.row) - 1, forward.longest(last))
        if not self.model.encodes:
            return row, 0
        forward.check_length(first, len(request.read), "an input")
        return row, rounded(len(request.read), forward.longest(first))

    def _count(self, shape: tuple[int, int]) -> int:
        return rows_of(self.model, max(shape), self.tokens or traits().scored_at_once) * shards(self.params)

    def _start(self, shape: tuple[int, int], group: list[tuple[int, Request]]) -> tuple[list[int], forward.Scored]:
        count = self._count(shape)
        first_B = np.ones(count, np.int32)
        first_B[: len(group)] = [request.first for _, request in group]
        rows = pad([request.row[:-1] for _, request in group], shape[0], count)
        follows = pad([request.row[1:] for _, request in group], shape[0], count).tokens
        read = pad([request.read for _, request in group], shape[1], count) if self.model.encodes else None
        with placing(self.params) as place:
            found = forward.score(self.model, self.vocabulary, self.params, *place((rows, follows, first_B, read)))
        return [number for number, _ in group], found


def _finished(numbers: list[int], found: forward.Scored) -> Iterator[tuple[int, Scores]]:
    log_p_B, greedy_B = np.asarray(found.log_p), np.asarray(found.greedy)
    require_finite(log_p_B[: len(numbers)])
    for number, log_p, greedy in zip(numbers, log_p_B.tolist(), greedy_B.tolist(), strict=False):
        yield number, Scores(log_p, greedy)


def require_finite(log_p: np.ndarray) -> None:
    """Raises `ConfigError` for a log p of nan or -inf, of which no score can be told: nan is neither more nor less than another.

    Finite logits in float32 give no -inf, so that too says that parameters or activations are not finite, or a token forbidden.
    """
    wrong = log_p[~np.isfinite(log_p)]
    if wrong.size:
        told = f"gives a log p of {wrong[0]}, so that it has no score: its training diverged, or its activations overflow"
        raise ConfigError(f"{told}: take an earlier checkpoint, or compute in float32", "the model")


# ── several devices ──────────────────────────────────────────────────────────────────────────────────────────────────
def _mesh(params: Params) -> jax.sharding.Mesh | None:
    """The mesh that parameters are split over, if they are."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None  # type: ignore[return-value]


def _axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH if axis in mesh.axis_names)


def shards(params: Params) -> int:
    """How many devices share the rows among them."""
    mesh = _mesh(params)
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in _axes(mesh)]))


@contextlib.contextmanager
def placing(params: Params) -> Iterator[Any]:
    """Within it a tree of host arrays `[B, …]` is put where the parameters are, its rows divided among the devices."""
    mesh = _mesh(params)
    if mesh is None:
        yield lambda tree: tree
        return
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_axes(mesh)))
    with jax.set_mesh(mesh):
        yield lambda tree: jax.device_put(tree, spread)
