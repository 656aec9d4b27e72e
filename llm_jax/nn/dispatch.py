"""How tokens reach the experts that they chose: with a bound on what an expert takes, or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require_positive
from llm_jax.core.platform import traits
from llm_jax.nn.kernels.grouped import batched_products, exchange, grouped_products, in_groups, sort
from llm_jax.nn.travel import STAYING, Journey, Ways, by_expert, chained, in_equal_parts, in_parts, packing, within

Over = Literal["batch", "row"]
Products = Callable[[jax.Array, Sequence[jax.Array]], list[jax.Array]]  # (rows [M, D], kernels [E, D, F]) -> [M, F] of each


class Away(NamedTuple):
    """Slots whose experts other devices have: how rows travel, and what multiplies them there.

    expert_M: whose each row is there, counted from the device's first expert. kept_M: slots of a device that were not left out.
    """

    journey: Journey
    products: Products
    expert_M: jax.Array
    kept_M: jax.Array | None = None


@dataclass(frozen=True)
class Slots:
    """Places, sorted by expert, that tokens take.

    load_BE: how many tokens of each row chose an expert. served_T: how many experts took a token. products: multiplies every slot
    by its expert's matrix. expert_M: whose each slot is.
    """

    load_BE: jax.Array
    served_T: jax.Array
    products: Products
    expert_M: jax.Array

    def spread(self, x_TD: jax.Array) -> jax.Array:
        """`[T, D] -> [M, D]`: every slot's token, 0 in empty ones."""
        raise NotImplementedError

    def collect(self, y_MD: jax.Array) -> jax.Array:
        """`[M, D] -> [T, D]`: every token's weighted sum of what its experts returned."""
        raise NotImplementedError

    def served(self, kept_M: jax.Array | None) -> jax.Array:
        """served_T where only these slots were; None: all."""
        return self.served_T

    def away(self, axis: str, devices: int) -> Away:
        """The same slots where the devices along a mesh axis share the experts, inside a `shard_map`."""
        experts = self.load_BE.shape[1]
        journey, each = in_equal_parts(axis, devices, experts), len(self.expert_M) // (experts // devices)
        return Away(journey, self.products, jnp.arange(len(self.expert_M)) // each)


@dataclass(frozen=True)
class Chosen(Slots):
    """Of experts that tokens chose.

    pair_M: the (token, choice) in each slot, numbered token by token; T·K: empty. slot_TK: where each of them is; M: nowhere.
    weight_TK: of each choice.
    """

    pair_M: jax.Array
    slot_TK: jax.Array
    weight_TK: jax.Array

    def spread(self, x_TD):
        return exchange(x_TD, self.pair_M // self.slot_TK.shape[1], self.slot_TK)

    def collect(self, y_MD):
        choices = *self.slot_TK.shape, y_MD.shape[1]
        y_TKD = exchange(y_MD, self.slot_TK.reshape(-1), self.pair_M[:, None]).reshape(choices)
        return (y_TKD * self.weight_TK[:, :, None]).sum(1).astype(y_MD.dtype)


@dataclass(frozen=True)
class Sorted(Chosen):
    """Of experts that take whatever chose them: sizes_E tokens each. block, room: as `Dropless` has them."""

    sizes_E: jax.Array
    block: int | None
    room: float | None

    def served(self, kept_M):
        if kept_M is None:
            return self.served_T
        return jnp.take(kept_M, self.slot_TK, mode="fill", fill_value=False).sum(1).astype(jnp.float32)

    def away(self, axis, devices):
        pairs, experts = self.slot_TK.size, len(self.sizes_E)
        own, most = experts // devices, len(self.slot_TK) * min(self.slot_TK.shape[1], experts // devices)
        arriving = devices * most if self.room is None else min(devices * most, math.ceil(self.room * pairs))
        sizes_nE = jax.lax.all_gather(self.sizes_E, axis)
        kept_nE = sizes_nE if self.room is None else within(sizes_nE, arriving, devices)
        here = jax.lax.axis_index(axis)
        ways = Ways(kept_nE.reshape(devices, devices, own).sum(2), axis, most)
        slots = len(self.expert_M)
        packed, kept_M = packing(self.sizes_E, kept_nE[here], slots) if self.room is not None else (STAYING, None)
        arrived = by_expert(jax.lax.dynamic_slice_in_dim(kept_nE, here * own, own, 1), arriving, self.block)
        products = lambda x_MD, kernels: grouped_products(x_MD, kernels, arrived.sizes_E, block=self.block)  # noqa: E731
        return Away(chained(packed, in_parts(ways, slots, arriving), arrived.journey), products, arrived.expert_M, kept_M)


@dataclass(frozen=True)
class Taken(Slots):
    """Of experts that chose tokens: token_M in each expert's M / E slots (T: none), with weight_M."""

    token_M: jax.Array
    weight_M: jax.Array

    def spread(self, x_TD):
        return jnp.take(x_TD, self.token_M, axis=0, mode="fill", fill_value=0)

    def collect(self, y_MD):
        weighted_MD = y_MD * self.weight_M[:, None]
        y_TD = jnp.zeros((len(self.served_T), y_MD.shape[1]), weighted_MD.dtype)
        return y_TD.at[self.token_M].add(weighted_MD, mode="drop").astype(y_MD.dtype)


@dataclass(frozen=True)
class Dispatch(Config):
    """How many of the tokens that chose an expert it takes, and how its products are computed."""

    abstract = True

    @property
    def causal(self) -> bool:
        """Whether what a token receives depends on no later token and no other row."""
        return True

    @property
    def rowwise(self) -> bool:
        """Whether rows can be dispatched apart, on the devices that hold them."""
        return True

    @property
    def tokenwise(self) -> bool:
        """Whether tokens can."""
        return False

    def plan(self, expert_TK: jax.Array, weight_TK: jax.Array, valid_T: jax.Array | None, *, experts: int, rows: int) -> Slots:
        """Slots for the experts that tokens of so many rows chose, first choice first; tokens that are not valid get none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dropless(Dispatch):
    """Every token reaches all the experts that it chose, however uneven the loads: Gale et al. 2023, MegaBlocks.

    form: "ragged" is `jax.lax.ragged_dot`; "blocks" multiplies `block` rows of one expert at a time, then what is left of them by
    fewer; "auto" asks the platform. On NVIDIA GPUs `ragged_dot` too does the work of all experts unless
    `jax_ragged_dot_use_gpu_pallas_triton_lowering` is set. room: where devices share the experts, each has memory for so many times
    the tokens that it would get on average, and what is more is left out, the same part of all that it would get; None: of all
    that may come.
    """

    form: Literal["auto", "blocks", "ragged"] = "auto"
    block: int = 512
    room: float | None = None

    @property
    def tokenwise(self):
        return True

    def validate(self):
        require_positive(self, "block", "room")

    def plan(self, expert_TK, weight_TK, valid_T, *, experts, rows):
        blocks = traits().expert_blocks if self.form == "auto" else self.form == "blocks"
        block = min(self.block, expert_TK.size) if blocks else None
        segment_TK = expert_TK if valid_T is None else jnp.where(valid_T[:, None], expert_TK, experts)
        found = in_groups(segment_TK.reshape(-1), experts, block)
        return Sorted(
            loads(segment_TK, experts, rows),
            (segment_TK < experts).sum(1).astype(jnp.float32),
            lambda x_MD, kernels: grouped_products(x_MD, kernels, found.sizes_E, block=block),
            found.group_M,
            found.source_M,
            found.slot_N.reshape(expert_TK.shape),
            weight_TK,
            found.sizes_E,
            block,
            self.room,
        )


@dataclass(frozen=True)
class Capacity(Dispatch):
    """An expert takes factor × active × tokens / experts tokens, rounded up, and no more: Lepikhin et al. 2021, GShard.

    over: the tokens that compete: each row's for themselves, or the whole batch's. priority: who comes first: "choice", all first
    choices before any second one, then by place, as in GShard, which lets a later token displace an earlier one's second choice;
    "position", place alone. Weights of what is left are not renormalized.
    """

    factor: float = 1.25
    over: Over = "row"
    priority: Literal["choice", "position"] = "choice"

    def validate(self):
        require_positive(self, "factor")

    @property
    def causal(self):
        return self.priority == "position" and self.over == "row"

    @property
    def rowwise(self):
        return self.over == "row"

    def plan(self, expert_TK, weight_TK, valid_T, *, experts, rows):
        tokens, active = expert_TK.shape
        groups = rows if self.over == "row" else 1
        share = self.factor * active / experts
        room, bound_G = bounds(share, tokens, groups, valid_T)
        group_T1 = (jnp.arange(tokens) // (tokens // groups))[:, None]
        segments, slots = experts * groups, experts * groups * room
        segment_TK = expert_TK * groups + group_T1
        if valid_T is not None:
            segment_TK = jnp.where(valid_T[:, None], segment_TK, segments)
        arranged = (lambda x_TK: x_TK.T) if self.priority == "choice" else (lambda x_TK: x_TK)
        order, place, sizes_S = sort(arranged(segment_TK).reshape(-1), segments)
        starts_S = jnp.cumsum(sizes_S) - sizes_S
        place_TK = arranged(place.reshape(arranged(segment_TK).shape))
        rank_TK = place_TK - starts_S[segment_TK.clip(max=segments - 1)]
        kept_TK = (segment_TK < segments) & (rank_TK < bound_G[group_T1])
        pair_N = arranged(jnp.arange(tokens * active).reshape(tokens, active)).reshape(-1)[order]
        filled_S = jnp.minimum(sizes_S, jnp.tile(bound_G, experts))
        at_SC = starts_S[:, None] + jnp.arange(room)[None]
        pair_SC = jnp.where(
            jnp.arange(room)[None] < filled_S[:, None], pair_N[at_SC.clip(max=tokens * active - 1)], tokens * active
        )
        chosen_TK = jnp.where(segment_TK < segments, expert_TK, experts)
        return Chosen(
            loads(chosen_TK, experts, rows),
            kept_TK.sum(1).astype(jnp.float32),
            batched_products,
            jnp.arange(slots) // (groups * room),
            pair_SC.reshape(-1),
            jnp.where(kept_TK, segment_TK * room + rank_TK, slots),
            weight_TK,
        )


def take(score_TE: jax.Array, valid_T: jax.Array | None, *, share: float, groups: int, rows: int) -> Taken:
    """Every expert's share × tokens of each group of tokens, those of the highest scores."""
    tokens, experts = score_TE.shape
    size = tokens // groups
    room, bound_G = bounds(share, tokens, groups, valid_T, limit=size)
    ranking_TE = score_TE if valid_T is None else jnp.where(valid_T[:, None], score_TE, -jnp.inf)
    ranking_EGS = jax.lax.stop_gradient(ranking_TE).T.reshape(experts, groups, size)
    index_EGC = jax.lax.top_k(ranking_EGS, room)[1] + (jnp.arange(groups) * size)[None, :, None]
    filled_EGC = jnp.broadcast_to(jnp.arange(room)[None, None] < bound_G[None, :, None], index_EGC.shape)
    token_M, filled_M = index_EGC.reshape(-1), filled_EGC.reshape(-1)
    expert_M = jnp.arange(token_M.size) // (groups * room)
    count_M = filled_M.astype(jnp.float32)
    load_BE = jnp.zeros((rows, experts)).at[token_M // (tokens // rows), expert_M].add(count_M)
    served_T = jnp.zeros(tokens).at[token_M].add(count_M)
    weight_M = score_TE[token_M, expert_M]
    return Taken(load_BE, served_T, batched_products, expert_M, jnp.where(filled_M, token_M, tokens), weight_M)


def bounds(share: float, tokens: int, groups: int, valid_T: jax.Array | None, limit: int | None = None) -> tuple[int, jax.Array]:
    """share × tokens of a group, rounded up: at most, and for each group by its valid tokens; `[G]`."""

    def bound(count, ceil):  # a share that rounding put just above a whole number is that number
        return ceil(count * share * (1 - 1e-6))

    size = tokens // groups
    room = min(max(bound(size, math.ceil), 1), limit or size)
    if valid_T is None:
        return room, jnp.full(groups, room)
    valid_G = valid_T.reshape(groups, size).sum(1)
    return room, jnp.minimum(bound(valid_G, jnp.ceil).astype(jnp.int32), room)


def loads(expert_TK: jax.Array, experts: int, rows: int) -> jax.Array:
    """How many tokens of each row chose each expert, `[B, E]` f32; the number `experts` stands for none."""
    row_T1 = (jnp.arange(len(expert_TK)) // (len(expert_TK) // rows))[:, None]
    index_TK = jnp.where(expert_TK < experts, row_T1 * experts + expert_TK, rows * experts)
    return jnp.bincount(index_TK.reshape(-1), length=rows * experts).reshape(rows, experts).astype(jnp.float32)
