"""How tokens travel to the devices that have their experts, and back (Lepikhin et al. 2021, §3.2).

Devices along a mesh axis share the experts in order. Everything here is on one of them, inside a `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.platform import traits
from llm_jax.nn.kernels.grouped import exchange, in_groups

Rows = Callable[[jax.Array], jax.Array]


class Journey(NamedTuple):
    """There: `[M, D]` of a device's own tokens, sorted by expert, to `[N, D]` of all tokens for its experts; back: the reverse."""

    there: Rows
    back: Rows


STAYING = Journey(lambda x_MD: x_MD, lambda y_MD: y_MD)


def chained(*journeys: Journey) -> Journey:
    """One after the other, and back in reverse."""

    def there(x):
        for journey in journeys:
            x = journey.there(x)
        return x

    def back(y):
        for journey in reversed(journeys):
            y = journey.back(y)
        return y

    return Journey(there, back)


def reordered(source_N: jax.Array, place_M: jax.Array) -> Journey:
    """To `y[n] = x[source[n]]`, 0 where source is M; place: where each row of x is in y; N: nowhere."""
    return Journey(lambda x_MD: exchange(x_MD, source_N, place_M[:, None]), lambda y_ND: exchange(y_ND, place_M, source_N[:, None]))


def in_equal_parts(axis: str, devices: int, experts: int) -> Journey:
    """Every expert takes equally many rows of every device, whose N rows are sorted by expert, then by where they come from."""
    own = experts // devices

    def there(x_MD):
        x = jax.lax.all_to_all(x_MD.reshape(devices, own, -1, x_MD.shape[1]), axis, 0, 0)
        return x.swapaxes(0, 1).reshape(x_MD.shape)

    def back(y_MD):
        y = y_MD.reshape(own, devices, -1, y_MD.shape[1]).swapaxes(0, 1)
        return jax.lax.all_to_all(y, axis, 0, 0).reshape(y_MD.shape)

    return Journey(there, back)


class Ways(NamedTuple):
    """Rows from every device to every other, `[n, n]` int32, and the most that one may have for another."""

    sizes: jax.Array
    axis: str
    most: int


def in_parts(ways: Ways, rows: int, arriving: int) -> Journey:
    """The first rows go to the first device, and so on; rows: M, arriving: N, of which what is not filled is 0.

    They arrive sorted by where they come from.
    """

    def there(x_MD):
        return _ship(ways.axis, ways.most, arriving, ways.sizes, x_MD)

    def back(y_ND):
        return _ship(ways.axis, ways.most, rows, ways.sizes.T, y_ND)

    return Journey(there, back)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ship(axis: str, most: int, arriving: int, sizes: jax.Array, x_MD: jax.Array) -> jax.Array:
    """`[M, D] -> [N, D]`: of each device's rows, sorted by where they go, sizes[from, to] to every other."""
    exchange = _ragged if traits().ragged_exchange else _padded
    return exchange(axis, most, arriving, sizes, x_MD)


def _ship_fwd(axis, most, arriving, sizes, x_MD):
    return _ship(axis, most, arriving, sizes, x_MD), (sizes, x_MD.shape[0])


def _ship_bwd(axis, most, arriving, saved, g_ND):
    sizes, rows = saved
    return None, _ship(axis, most, rows, sizes.T, g_ND)


_ship.defvjp(_ship_fwd, _ship_bwd)


def _before(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Sums of what stands before each entry."""
    return jnp.cumsum(sizes, axis) - sizes


def _ragged(axis, most, arriving, sizes, x_MD):
    here = jax.lax.axis_index(axis)
    sent, received = sizes[here], sizes[:, here]
    out_ND = jnp.zeros((arriving, x_MD.shape[1]), x_MD.dtype)
    return jax.lax.ragged_all_to_all(x_MD, out_ND, _before(sent), sent, _before(sizes)[here], received, axis_name=axis)


def _padded(axis, most, arriving, sizes, x_MD):
    """The same by messages of one length, where the platform has no others."""
    here = jax.lax.axis_index(axis)
    sent, received = sizes[here], sizes[:, here]
    place_nC = _before(sent)[:, None] + jnp.arange(most)[None]
    packed_nCD = jnp.take(
        x_MD, jnp.where(jnp.arange(most)[None] < sent[:, None], place_nC, len(x_MD)), 0, mode="fill", fill_value=0
    )
    packed_nCD = jax.lax.all_to_all(packed_nCD, axis, 0, 0)
    row_N = jnp.arange(arriving)
    source_N = jnp.searchsorted(jnp.cumsum(received), row_N, side="right")
    from_N = source_N * most + row_N - _before(received)[source_N.clip(max=len(received) - 1)]
    known_N = jnp.where(source_N < len(received), from_N, packed_nCD.shape[0] * most)
    return jnp.take(packed_nCD.reshape(-1, x_MD.shape[1]), known_N, 0, mode="fill", fill_value=0)


# ── who is left out, and in what order experts find what came ────────────────────────────────────────────────────────
def within(sizes_nE: jax.Array, room: int, devices: int) -> jax.Array:
    """Of the rows that each device has for each expert, `[n, E]`, those that its device has room for: the same share of all."""
    experts = sizes_nE.shape[1]
    total_E = jnp.repeat(sizes_nE.sum(0).reshape(devices, -1).sum(1), experts // devices)
    share_E = jnp.minimum(room / jnp.maximum(total_E, 1), 1.0)
    return jnp.where(share_E[None] >= 1, sizes_nE, jnp.floor(sizes_nE * share_E[None]).astype(sizes_nE.dtype))


def packing(sizes_E: jax.Array, kept_E: jax.Array, rows: int) -> tuple[Journey, jax.Array]:
    """To the first kept_E of each expert's sizes_E rows, one after the other; and which rows they are, `[M]` bool."""
    row_M = jnp.arange(rows)

    def rank(sizes_E):
        expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), row_M, side="right")
        inside_M, expert_M = expert_M < len(sizes_E), expert_M.clip(max=len(sizes_E) - 1)
        return expert_M, row_M - _before(sizes_E)[expert_M], inside_M

    expert_M, rank_M, inside_M = rank(kept_E)
    source_M = jnp.where(inside_M, _before(sizes_E)[expert_M] + rank_M, rows)
    expert_M, rank_M, inside_M = rank(sizes_E)
    kept_M = inside_M & (rank_M < kept_E[expert_M])
    return reordered(source_M, jnp.where(kept_M, _before(kept_E)[expert_M] + rank_M, rows)), kept_M


class Arrived(NamedTuple):
    """Rows in order of a device's experts: the way there, how many each expert has, and whose each row is."""

    journey: Journey
    sizes_E: jax.Array
    expert_M: jax.Array


def by_expert(sizes_nE: jax.Array, arriving: int, block: int | None) -> Arrived:
    """Of rows from n devices, sizes[from, expert] each, sorted by where they come from. block: spare rows follow for it."""
    devices, experts = sizes_nE.shape
    cell_N = jnp.searchsorted(jnp.cumsum(sizes_nE.reshape(-1)), jnp.arange(arriving), side="right")
    segment_N = jnp.where(cell_N < devices * experts, cell_N % experts, experts)
    found = in_groups(segment_N, experts, block)
    return Arrived(reordered(found.source_M, found.slot_N), found.sizes_E, found.group_M)
