"""Products of rows that are sorted by the matrix they belong to, and the exchange of rows that sorts them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def batched_products(x_MD: jax.Array, kernels: Sequence[jax.Array]) -> list[jax.Array]:
    """`[M, D] · [E, D, F] -> [M, F]` for each of the kernels, of whose matrices every one has M / E rows."""
    x_ECD = x_MD.reshape(len(kernels[0]), -1, x_MD.shape[1])
    return [jnp.matmul(x_ECD, kernel_EDF).reshape(len(x_MD), -1) for kernel_EDF in kernels]


def grouped_products(x_MD: jax.Array, kernels: Sequence[jax.Array], sizes_E: jax.Array, *, block: int | None) -> list[jax.Array]:
    """`[M, D] · [E, D, F] -> [M, F]` for each kernel: the first sizes[0] rows by its first matrix, the next sizes[1] by its second.

    Rows after the last group are undefined. block: a group's rows are multiplied so many at a time, what is left by quarters and
    sixteenths of that, and `spare(block)` rows must follow the last group; None is `jax.lax.ragged_dot`, which on XLA:CPU
    multiplies every row by every matrix. Gradients are summed in float32 at least.
    """
    if block is None:
        return [jax.lax.ragged_dot(x_MD, kernel_EDF, sizes_E) for kernel_EDF in kernels]
    return _blocks(x_MD, list(kernels), sizes_E, min(block, len(x_MD)))


def spare(block: int) -> int:
    """How many rows the last block of a group runs over its end, at most."""
    return block // 4


def _each_group(sizes_E: jax.Array, function: Callable[[jax.Array, jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
    """`carry = function(matrix, first row, row after the last, carry)` for the groups that have rows, in their order."""
    ends_E, nonempty_E = jnp.cumsum(sizes_E), sizes_E > 0
    order_E = jnp.argsort(~nonempty_E, stable=True)

    def body(index, carry):
        expert = order_E[index]
        return function(expert, ends_E[expert] - sizes_E[expert], ends_E[expert], carry)

    return jax.lax.fori_loop(0, nonempty_E.sum(), body, carry)


def _each_block(first: jax.Array, end: jax.Array, block: int, function: Callable[[int, jax.Array, Any], Any], carry: Any) -> Any:
    """`carry = function(rows, first of them, carry)` for blocks that cover first … end: whole ones, then quarters, then sixteenths.

    What is left takes the larger kind of block where it fills three quarters of one.
    """
    sizes = sorted({max(block // parts, 1) for parts in (1, 4, 16)}, reverse=True)
    for rows in sizes:
        extra = rows - 1 if rows == sizes[-1] else rows // 4
        count = (end - first + extra) // rows
        carry = jax.lax.fori_loop(0, count, lambda i, c, at=first, rows=rows: function(rows, at + i * rows, c), carry)
        first = jnp.minimum(first + count * rows, end)
    return carry


def _rows(x, first, count):
    return jax.lax.dynamic_slice_in_dim(x, first, count)


def _write(x, first, rows):
    return jax.lax.dynamic_update_slice_in_dim(x, rows, first, 0)


def _forward(x_MD, kernels, sizes_E, block):
    def group(expert, first, end, ys):
        own = [_rows(kernel_EDF, expert, 1)[0] for kernel_EDF in kernels]

        def step(rows, at, ys):
            x_bD = _rows(x_MD, at, rows)
            # what runs over into the next group is written again by that one, which comes later
            return [_write(y_MF, at, x_bD @ kernel_DF) for y_MF, kernel_DF in zip(ys, own, strict=True)]

        return _each_block(first, end, block, step, ys)

    return _each_group(sizes_E, group, [jnp.zeros((len(x_MD), kernel.shape[2]), x_MD.dtype) for kernel in kernels])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocks(x_MD, kernels, sizes_E, block):
    return _forward(x_MD, kernels, sizes_E, block)


def _blocks_fwd(x_MD, kernels, sizes_E, block):
    return _forward(x_MD, kernels, sizes_E, block), (x_MD, kernels, sizes_E)


def _blocks_bwd(block, saved, gs):
    x_MD, kernels, sizes_E = saved
    wide = jnp.promote_types(x_MD.dtype, jnp.float32)
    multiply = partial(jnp.matmul, preferred_element_type=wide)
    narrow = x_MD.shape[1] <= sum(g_MF.shape[1] for g_MF in gs)

    def group(expert, first, end, carry):
        dx_MD, dws = carry
        own = [_rows(kernel_EDF, expert, 1)[0] for kernel_EDF in kernels]

        def step(rows, at, carry):
            dx_MD, dws = carry
            x_bD, gs_bF = _rows(x_MD, at, rows), [_rows(g_MF, at, rows) for g_MF in gs]
            dx_bD = sum(multiply(g_bF, kernel_DF.T) for g_bF, kernel_DF in zip(gs_bF, own, strict=True))
            # rows of the next group add nothing: of the factors, the narrower is masked
            ours_b1 = (jnp.arange(rows) < end - at)[:, None]
            if narrow:
                x_bD = jnp.where(ours_b1, x_bD, 0)
            else:
                gs_bF = [jnp.where(ours_b1, g_bF, 0) for g_bF in gs_bF]
            dws = [dw_DF + multiply(x_bD.T, g_bF) for dw_DF, g_bF in zip(dws, gs_bF, strict=True)]
            return _write(dx_MD, at, dx_bD.astype(dx_MD.dtype)), dws

        dx_MD, sums = _each_block(first, end, block, step, (dx_MD, [jnp.zeros_like(kernel_DF, wide) for kernel_DF in own]))
        return dx_MD, [_write(dw_EDF, expert, dw_DF[None].astype(dw_EDF.dtype)) for dw_EDF, dw_DF in zip(dws, sums, strict=True)]

    dx_MD, dws = _each_group(sizes_E, group, (jnp.zeros_like(x_MD), [jnp.zeros_like(kernel) for kernel in kernels]))
    return dx_MD, dws, np.zeros(sizes_E.shape, jax.dtypes.float0)


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


@jax.custom_vjp
def exchange(x_ND: jax.Array, source_M: jax.Array, slots_NK: jax.Array) -> jax.Array:
    """`y[m] = x[source[m]]`, 0 where source[m] = N; `[N, D] -> [M, D]`.

    slots: the same map read backwards, the places of y that each row of x goes to (M: none), which makes the gradient a sum of
    K gathered rows where autodiff's would be a scatter.
    """
    return _gather(x_ND, source_M)


def _gather(x_ND, index):
    return jnp.take(x_ND, index, axis=0, mode="fill", fill_value=0)


def _exchange_bwd(saved, g_MD):
    source_M, slots_NK = saved
    none = (np.zeros(index.shape, jax.dtypes.float0) for index in (source_M, slots_NK))
    return _gather(g_MD, slots_NK).sum(1), *none


exchange.defvjp(lambda x, source, slots: (_gather(x, source), (source, slots)), _exchange_bwd)


def sort(segment_N: jax.Array, segments: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order that sorts by segment and keeps order within, the place of each entry in it, the size of each segment.

    The number `segments` stands for none and comes last.
    """
    count = segment_N.size
    if (segments + 1) * count < 1 << 31:
        # plain integers: XLA:CPU takes 4× as long to sort if an index goes along
        order_N = jnp.sort(segment_N * count + jnp.arange(count)) % count
    else:
        order_N = jnp.argsort(segment_N, stable=True)
    place_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(count), unique_indices=True)
    return order_N, place_N, jnp.bincount(segment_N, length=segments).astype(jnp.int32)


class Groups(NamedTuple):
    """N entries in M slots, sorted by group.

    source_M: the entry in each slot; N: none. slot_N: where each entry is; M: nowhere. sizes_E: of each group. group_M: whose each
    slot is.
    """

    source_M: jax.Array
    slot_N: jax.Array
    sizes_E: jax.Array
    group_M: jax.Array


def in_groups(group_N: jax.Array, groups: int, block: int | None) -> Groups:
    """Entries of the group `groups` are in none. block: spare slots follow for it."""
    count = group_N.size
    order_N, place_N, sizes_E = sort(group_N, groups)
    slots, ends_E = count + (spare(block) if block else 0), jnp.cumsum(sizes_E)
    return Groups(
        jnp.where(jnp.arange(slots) < ends_E[-1], jnp.pad(order_N, (0, slots - count)), count),
        jnp.where(group_N < groups, place_N, slots),
        sizes_E,
        jnp.searchsorted(ends_E, jnp.arange(slots), side="right").clip(max=groups - 1),
    )
