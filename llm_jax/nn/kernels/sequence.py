"""Attention of rows whose tokens are split over devices (context parallelism): keys come to the queries.

"gather" brings every device all keys and values of its rows; with "ring" they go round from neighbour to neighbour, and no device
ever holds more than two pieces of them (Liu et al. 2023, Ring Attention). Where queries see what stands before them, later ones
have more to do: of 2n pieces of a row device i then works on pieces i and 2n - 1 - i (Llama Team 2024, §3.3.2), which are sent
there and back, so that nothing outside notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.core.sharding import axes_over, by_hand, parts
from llm_jax.nn.kernels import blockwise
from llm_jax.nn.kernels.blockwise import Arrays, Rule
from llm_jax.nn.kernels.call import Call
from llm_jax.nn.masks import Places

WHOLE = PartitionSpec()
HEADS = "q_BLHK", "k_BMGK", "v_BMGV"


class Line(NamedTuple):
    """The devices that share the tokens of a row: their mesh axes, how many they are, and whether the row is dealt out evenly."""

    axes: tuple[str, ...]
    size: int
    dealt: bool

    def owners(self, length: int) -> np.ndarray:
        """`[n, L / n]`: the places in the row that each device works on."""
        if not self.dealt:
            return np.arange(length, dtype=np.int32).reshape(self.size, -1)
        pieces = np.arange(length, dtype=np.int32).reshape(2 * self.size, -1)
        return np.concatenate([pieces[: self.size], pieces[self.size :][::-1]], 1)

    def deal(self, x: jax.Array) -> jax.Array:
        """`[B, L / n, …]` of consecutive tokens: those that the device works on."""
        if not self.dealt:
            return x
        first, second = jnp.split(x, 2, 1)
        even, odd = (jax.lax.ppermute(half, self.axes, self._to(start)) for half, start in ((first, 0), (second, 1)))
        return self._in_order(even, odd)

    def collect(self, x: jax.Array) -> jax.Array:
        """The inverse of `deal`."""
        if not self.dealt:
            return x
        pieces = jnp.split(self._in_order(*jnp.split(x, 2, 1)), 2, 1)
        back = ([(to, start) for start, to in self._to(half)] for half in (0, 1))
        return jnp.concatenate([jax.lax.ppermute(x, self.axes, way) for x, way in zip(pieces, back, strict=True)], 1)

    def own(self, length: int) -> jax.Array:
        """`[L / n]`: the places that this device works on."""
        return jnp.asarray(self.owners(length))[jax.lax.axis_index(self.axes)]

    def gathered(self, x: jax.Array) -> jax.Array:
        """Keys or values `[B, L, G, K]` of every device's `[B, L / n, G, K]`, in order."""
        message = partial(jax.lax.all_gather, axis_name=self.axes, axis=1, tiled=True)
        return by_hand(message, x, "batch", None, "kv_heads_act", None)

    def pass_on(self, tree: Any) -> Any:
        """What the neighbour before had."""
        ring = [(device, (device + 1) % self.size) for device in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, ring), tree)

    def _to(self, half: int) -> list[tuple[int, int]]:
        """Where each device's first or second piece is worked on."""
        pieces = ((device, 2 * device + half) for device in range(self.size))
        return [(device, piece if piece < self.size else 2 * self.size - 1 - piece) for device, piece in pieces]

    def _in_order(self, even: jax.Array, odd: jax.Array) -> jax.Array:
        """Of a device's two pieces one has an even number, the lower one where its own is; the map is its own inverse."""
        is_even = jax.lax.axis_index(self.axes) % 2 == 0
        return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], 1)


def line_of(call: Call, *, unit: int = 1) -> Line | None:
    """How a mesh splits the tokens of queries and keys; None: not at all, or not in pieces of a multiple of `unit`."""
    length, keys = call.lengths
    axes = axes_over("length", length)
    if not axes or length != keys or length % (parts(axes) * unit):
        return None
    low, high = call.mask.span(length, length)
    uneven = low is None and high is not None
    return Line(axes, parts(axes), uneven and length % (2 * parts(axes) * unit) == 0)


# ── all keys for everyone ────────────────────────────────────────────────────────────────────────────────────────────
def gather(call: Call, line: Line, attend: Callable[[Call], jax.Array]) -> jax.Array:
    """`[B, L, H, V]`; attend: how a device attends."""

    def local(arrays, rest):
        queries, keys, bias, sinks_H, key = rest
        q_BLHK, *pieces = arrays
        own = replace(
            call,
            **dict(zip(HEADS, (line.deal(q_BLHK), *map(line.gathered, pieces)), strict=True)),
            queries=queries.at(line.own(call.lengths[0])),
            keys=keys,
            bias=bias,
            sinks_H=sinks_H,
            key=None if key is None else jax.random.fold_in(key, jax.lax.axis_index(line.axes)),
        )
        return line.collect(attend(own))

    rest = call.queries, call.keys, call.bias, call.sinks_H, call.key
    return _on_devices(line, local)((call.q_BLHK, call.k_BMGK, call.v_BMGV), rest)


def _on_devices(line: Line, local: Callable) -> Callable:
    split = PartitionSpec(None, line.axes)
    return jax.shard_map(local, in_specs=(split, WHOLE), out_specs=split, axis_names=set(line.axes), check_vma=False)


# ── round and round ──────────────────────────────────────────────────────────────────────────────────────────────────
class Given(NamedTuple):
    """What is not differentiated: where all tokens of the row stand, and dropout."""

    queries: Places
    keys: Places
    rate: jax.Array
    key: jax.Array | None


@dataclass(frozen=True, eq=False)
class Ring:
    """How a device attends, apart from arrays. call: with the shapes of its part of queries, keys and values; length: of a row."""

    line: Line
    call: Call
    rule: Rule
    block: int
    length: int

    def context(self, given: Given, step: Any) -> blockwise.Context:
        """What the device's queries meet after so many steps: the keys of the device so many before it."""
        device = jax.lax.axis_index(self.line.axes)
        source = (device - step) % self.line.size
        owners = jnp.asarray(self.line.owners(self.length))
        queries, keys = given.queries.at(owners[device]), given.keys.at(owners[source])
        key = None if given.key is None else jax.random.fold_in(given.key, device * self.line.size + source)
        return blockwise.context(replace(self.call, queries=queries, keys=keys, rate=given.rate, key=key), self.block, self.block)


def ring(call: Call, line: Line) -> jax.Array:
    """`[B, L, H, V]` by blocks."""
    length, size = call.lengths[0], call.lengths[0] // line.size
    block = blockwise.block(size // 2 if line.dealt else size)

    def local(arrays, rest):
        queries, keys, params, sinks_H, rate, key = rest
        bias = None if call.bias is None else replace(call.bias, params=params)
        heads = dict(zip(HEADS, map(line.deal, arrays), strict=True))
        own = replace(call, **heads, bias=bias, sinks_H=sinks_H)
        bare = replace(call, **{name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in heads.items()}, sinks_H=None)
        how = Ring(line, replace(bare, bias=None), blockwise.rule(own), block, length)
        given = Given(queries, keys, jnp.asarray(rate, jnp.float32), key)
        return line.collect(blockwise.joined(_attend(how, blockwise.arrays(own, block, block), given), size))

    params = None if call.bias is None else call.bias.params
    rest = call.queries, call.keys, params, call.sinks_H, call.rate, call.key
    return _on_devices(line, local)((call.q_BLHK, call.k_BMGK, call.v_BMGV), rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: Ring, arrays: Arrays, given: Given) -> jax.Array:
    """`[n, B, G, R, r, V]`."""
    return _fwd(how, arrays, given)[0]


def _fwd(how: Ring, arrays: Arrays, given: Given):
    def meet(step, k, v, out, log_sum):
        more, own = blockwise.forward(how.rule, arrays._replace(k=k, v=v, sinks=None), how.context(given, step))
        total = jnp.logaddexp(log_sum, own)
        return out * jnp.exp(log_sum - total)[..., None] + more * jnp.exp(own - total)[..., None], total

    def turn(state, step):
        k, v, *sums = state
        following = how.line.pass_on((k, v))  # on its way while this piece is worked on
        return (*following, *meet(step, k, v, *sums)), None

    shape = arrays.q.shape[:-1]
    log_sum = jnp.full(shape, blockwise.FLOOR, how.rule.dtype)
    if arrays.sinks is not None:
        log_sum = jnp.broadcast_to(arrays.sinks.astype(how.rule.dtype)[None, None, :, :, None], shape)
    start = arrays.k, arrays.v, jnp.zeros((*shape, arrays.v.shape[-1]), how.rule.dtype), log_sum
    last, _ = jax.lax.scan(turn, start, jnp.arange(how.line.size - 1))
    out, log_sum = meet(how.line.size - 1, *last)
    out = out.astype(arrays.v.dtype)
    return out, (arrays, given, out, log_sum)


def _bwd(how: Ring, saved, g):
    arrays, given, out, log_sum = saved

    def turn(state, step):
        k, v, dk, dv, dq, dparams = state
        piece = arrays._replace(k=k, v=v, sinks=None)
        found = blockwise.backward(how.rule, piece, how.context(given, step), out, log_sum, g)
        k, v, dk, dv = how.line.pass_on((k, v, dk + found.k, dv + found.v))
        return (k, v, dk, dv, dq + found.q, jax.tree.map(jnp.add, dparams, found.params)), None

    zeros = (jnp.zeros(x.shape, how.rule.dtype) for x in (arrays.k, arrays.v, arrays.q))
    start = arrays.k, arrays.v, *zeros, jax.tree.map(jnp.zeros_like, arrays.params)
    (_, _, dk, dv, dq, dparams), _ = jax.lax.scan(turn, start, jnp.arange(how.line.size))
    grads = Arrays(dq, dk, dv, dparams, blockwise.sinks_gradient(how.rule, arrays, out, log_sum, g))
    return jax.tree.map(lambda d, x: d.astype(x.dtype), grads, arrays), None


_attend.defvjp(_fwd, _bwd)
