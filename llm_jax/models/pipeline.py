"""Layers in stages: every device has some of them, and micro-batches go from device to device (Huang et al. 2019, GPipe).

Each of S stages works on another micro-batch at the same time: M of them take M + S - 1 turns, of which S - 1 are idle. In R rounds
a stage has R shorter runs of layers, and micro-batches go round as often (the circular schedule; Narayanan et al. 2021, §2.2):
M·R turns of 1/R the length, and S - 1 idle ones. Parameters lie over the stages in the layers' order, so in rounds every step
begins by sending most of them to the stages that work with them, and ends by sending their gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.sharding import axes_over, by_hand, layout, parts
from llm_jax.nn.context import Context

STAGE = "stage"
Layer = Callable[[Any, jax.Array, jax.Array, Context, jax.Array, Any], tuple[jax.Array, Any]]
NAMES = "batch", None, "length"  # of the first dimensions of `[G, rows, L, …]`


class Schedule(NamedTuple):
    """Stages, rounds and micro-batches; groups: devices of other mesh axes that share the rows."""

    stages: int
    rounds: int
    micro: int
    groups: int

    @property
    def turns(self) -> int:
        """Until the last micro-batch has left the last stage in the last round."""
        return self.micro * self.rounds + self.stages - 1


def schedule_of(rows: int) -> Schedule | None:
    """How a mesh takes so many rows through stages; None: it has none, or the rows do not divide among them."""
    axes = axes_over("batch", rows)
    if STAGE not in axes:
        return None
    stages = parts((STAGE,))
    groups = parts(axes) // stages
    wanted, each = layout().microbatches or stages, rows // groups
    micro = max(m for m in range(stages, max(wanted, stages) + 1, stages) if each % m == 0)
    return Schedule(stages, layout().rounds, micro, groups)


def pipeline(
    layer: Layer, params: Any, x: jax.Array, context: Context, schedule: Schedule, key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """`x [B, …]` through n layers, and what each leaves, `[n, …]`, added up over micro-batches.

    layer: `(its parameters, x, its number, Context, the micro-batch's number, key) -> (x, what it leaves)`; params: `[n, …]`.
    Nothing traced comes to it from outside.
    """
    S, R, G = schedule.stages, schedule.rounds, schedule.groups

    def in_stages(leaf):  # of each round, one run of layers a stage
        return leaf.reshape(R, S, -1, *leaf.shape[1:])

    def in_groups(leaf):
        return leaf.reshape(G, -1, *leaf.shape[1:])

    own, common = _by_row(context, len(x))
    through = jax.shard_map(
        lambda *given: _through(layer, schedule, *given),
        in_specs=(*[PartitionSpec(None, STAGE)] * 3, PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(None, STAGE), PartitionSpec(None, STAGE)),
        axis_names={STAGE},
        check_vma=False,
    )
    y, left = through(jax.tree.map(in_stages, params), in_groups(x), jax.tree.map(in_groups, own), common, key)
    return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), left)


def _by_row(context: Context, rows: int) -> tuple[Any, Context]:
    """What of the context differs from row to row, a list of leaves `[B, …]` or None, and the rest, with None in those places."""
    leaves, tree = jax.tree.flatten((context.places, context.memory))
    own = [leaf if len(leaf) == rows else None for leaf in leaves]
    rest = tree.unflatten([leaf if mine is None else jnp.zeros(()) for leaf, mine in zip(leaves, own, strict=True)])
    return own, replace(context, places=rest[0], memory=rest[1])


def _whole(own: list[Any], common: Context) -> Context:
    """The context with what differs from row to row put back."""
    leaves, tree = jax.tree.flatten((common.places, common.memory))
    places, memory = tree.unflatten([leaf if mine is None else mine for leaf, mine in zip(leaves, own, strict=True)])
    return replace(common, places=places, memory=memory)


def _names(first: tuple[str | None, ...], x: jax.Array) -> tuple[str | None, ...]:
    """A name for each dimension, None after the first."""
    return (*first, *[None] * x.ndim)[: x.ndim]


def _through(layer: Layer, schedule: Schedule, params: Any, rows: jax.Array, own: list[Any], common: Context, key: Any):
    """All turns on one stage; its rows and what it returns are `[G, B / (G·S), …]`."""
    S, R, M, G = schedule
    stage = jax.lax.axis_index(STAGE)
    params = jax.tree.map(lambda leaf: leaf[:, 0], params)
    each = len(jax.tree.leaves(params)[0][0])
    only = jax.tree.map(lambda leaf: leaf[0], params) if R == 1 else None  # the same in all turns, or each would keep its own

    def micro_batches(leaf):  # `[M, rows, …]`
        gather = partial(jax.lax.all_gather, axis_name=STAGE, axis=1, tiled=True)
        leaf = by_hand(gather, leaf, *_names(NAMES, leaf))
        leaf = leaf.reshape(G, M, -1, *leaf.shape[2:]).swapaxes(0, 1)
        return leaf.reshape(M, -1, *leaf.shape[3:])

    def run(x, turn):
        unit = (turn - stage).clip(0, M * R - 1)
        this_round, micro = unit // M, unit % M
        context = _whole(jax.tree.map(lambda leaf: leaf[micro], own_M), common)

        def one(x, given):
            own_params, index = given
            number = (this_round * S + stage) * each + index
            return layer(own_params, x, number, context, micro, key)

        chosen = jax.tree.map(lambda leaf: leaf[this_round], params) if only is None else only
        return jax.lax.scan(one, x, (chosen, jnp.arange(each)))

    def turn(state, t):
        waiting, x, left = state
        y, more = run(jnp.where(stage == 0, waiting[t % M], x), t)
        counted = (t >= stage) & (t - stage < M * R)
        at = ((t - stage) // M).clip(0, R - 1)
        left = jax.tree.map(lambda sums, new: sums.at[at].add(jnp.where(counted, new, 0)), left, more)
        x = jax.lax.ppermute(y, STAGE, [(s, (s + 1) % S) for s in range(S)])
        back = (t - S + 1) % M  # who comes back to the first stage, to go round again or because it is done
        return (jnp.where(t >= S - 1, waiting.at[back].set(x), waiting), x, left), None

    rows_M, own_M = micro_batches(rows), jax.tree.map(micro_batches, own)
    shapes = jax.eval_shape(run, rows_M[0], jnp.int32(0))[1]
    left = jax.tree.map(lambda s: jnp.zeros((R, *s.shape), s.dtype), shapes)
    (done_M, _, left), _ = jax.lax.scan(turn, (rows_M, rows_M[0], left), jnp.arange(schedule.turns))
    # the first stage has what came back; every stage goes on with its part of the rows
    scatter = partial(jax.lax.psum_scatter, axis_name=STAGE, scatter_dimension=0, tiled=True)
    mine = by_hand(scatter, jnp.where(stage == 0, done_M, 0), *_names((None, "batch", "length"), done_M))
    mine = mine.reshape(M // S, G, -1, *mine.shape[2:]).swapaxes(0, 1)
    return mine.reshape(G, -1, *mine.shape[3:]), jax.tree.map(lambda leaf: leaf[:, None], left)
