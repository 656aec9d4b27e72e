"""Mixture of experts (Shazeer et al. 2017): feed-forward networks of which every token uses a few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.config import require, require_positive, traced
from llm_jax.core.sharding import axes_over, by_hand, constrain, partitioned, parts, spec_over
from llm_jax.core.types import Weighted
from llm_jax.nn.activations import ACTIVATIONS
from llm_jax.nn.dispatch import Away, Dispatch, Dropless, Over, Slots
from llm_jax.nn.dropout import dropout
from llm_jax.nn.ffn import MLP, Dense, FeedForward, Gated
from llm_jax.nn.kernels.product import product
from llm_jax.nn.linear import Linear, normal
from llm_jax.nn.routing import ExpertChoice, Router, Softmax, balance_loss, z_loss

AXES = {"gate": ("embed", "hidden"), "up": ("embed", "hidden"), "down": ("hidden", "embed")}  # of each expert's kernels
Weights = Mapping[str, tuple[jax.Array, jax.Array | None]]  # name → kernels [E, in, out], biases [E, out]


@dataclass(frozen=True)
class MoE(FeedForward):
    """Σ over the `active` chosen of `experts` of weight · expert(x), + shared(x), which every token uses.

    balance, z_loss: weights of the auxiliary losses. balance_over: whether loads are to be even over the batch or in each row.
    """

    experts: int = 8
    active: int = 2
    expert: Dense | Gated = field(default_factory=Gated)
    shared: Dense | Gated | None = None
    router: Router = field(default_factory=Softmax)
    dispatch: Dispatch = field(default_factory=Dropless)
    balance: float = traced(0.01)
    balance_over: Over = "batch"
    z_loss: float = traced(0.0)

    def validate(self):
        require_positive(self, "experts", "active")
        require(self.active <= self.experts, "active", f"must be at most experts={self.experts}, got {self.active}")
        require(self.balance >= 0, "balance", f"must be >= 0, got {self.balance}")
        require(self.z_loss >= 0, "z_loss", f"must be >= 0, got {self.z_loss}")
        self.router.check(self.experts, self.active)
        bounded = isinstance(self.router, ExpertChoice) and not isinstance(self.dispatch, Dropless)
        require(not bounded, "dispatch", "has no say where experts choose their tokens: leave it at Dropless()")

    @property
    def branches(self) -> int:  # type: ignore[override]
        """Projections into an expert's hidden units."""
        return self.expert.branches

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether a token's output depends on no later token; where not, a model cannot generate what it was trained on."""
        return self.router.causal and self.dispatch.causal

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        """Whether a row's outputs and losses are the same without the batch's other rows, however many devices share them."""
        unbalanced = isinstance(self.balance, (int, float)) and self.balance == 0
        return self.router.rowwise and self.dispatch.rowwise and (self.balance_over == "row" or unbalanced)

    def hidden(self, width: int) -> int:
        return self.active * self.expert.hidden(width) + (self.shared.hidden(width) if self.shared else 0)

    def entries(self, width: int) -> int:
        shared = self.shared.entries(width) if self.shared else 0
        return width * self.experts + round(self.used * self.expert.entries(width)) + shared

    def parameters(self, width: int) -> int:
        router = self.experts * (width + self.router.bias)
        shared = self.shared.parameters(width) if self.shared else 0
        return router + self.experts * self.expert.parameters(width) + shared

    def idle(self, width: int) -> int:
        return round((self.experts - self.used) * self.expert.parameters(width))

    def build(self, gain: float, dtype: Any, name: str) -> nn.Module:
        return Experts(self, gain, dtype, name=name)

    @property
    def used(self) -> float:
        """Experts that a token meets, on average."""
        return self.active * getattr(self.router, "capacity", 1.0)

    def penalty(self, sown: Mapping[str, Any]) -> Weighted:
        """The auxiliary losses by their weights, summed over tokens, and over layers where they are stacked; over the tokens."""
        balance, z = sown["balance"], sown["z_loss"]
        total = self.balance * balance.total.sum() + self.z_loss * z.total.sum()
        return Weighted(total, balance.weight.reshape(-1)[0])


class Bank(nn.Module):
    """A kernel `[E, inputs, outputs]`: a `Linear`'s for every expert, drawn with the deviation of one, gain / √inputs."""

    experts: int
    inputs: int
    outputs: int
    axes: tuple[str, str]
    gain: float
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernels `[E, in, out]` and biases `[E, out]` in the compute dtype."""
        init = partitioned(normal(self.gain / math.sqrt(self.inputs)), ("expert", *self.axes))
        kernel = self.param("kernel", init, (self.experts, self.inputs, self.outputs), jnp.float32).astype(self.dtype)
        if not self.bias:
            return kernel, None
        zeros = partitioned(nn.initializers.zeros, ("expert", self.axes[1]))
        return kernel, self.param("bias", zeros, (self.experts, self.outputs), jnp.float32).astype(self.dtype)


class Kernels(nn.Module):
    """The matrices of all experts, by name."""

    config: MoE
    width: int
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self) -> Weights:
        c, hidden = self.config, self.config.expert.hidden(self.width)
        require(hidden > 0, "ffn.expert.ratio", "leaves no hidden unit: raise it")

        def bank(name: str, inputs: int, outputs: int, gain: float = 1.0):
            return Bank(c.experts, inputs, outputs, AXES[name], gain, c.expert.bias, self.dtype, name=name)()

        ups = ("gate", "up") if c.expert.branches == 2 else ("up",)
        weights = {name: bank(name, self.width, hidden) for name in ups}
        return weights | {"down": bank("down", hidden, self.width, self.gain)}


class Experts(nn.Module):
    """`[B, L, D] -> [B, L, D]` of a mixture of experts. gain: of the last matrices' initialisation.

    Sows into "routing", where that collection is mutable: "load" `[E]` f32, how often each expert was chosen; "dropped", choices
    that were not carried out, over all choices (with `ExpertChoice`, tokens that no expert took, over all tokens); "balance" and
    "z_loss", the auxiliary losses summed over tokens, over the tokens. All of them add up over micro-batches.
    """

    config: MoE
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, rates: Mapping[str, Any], valid_BL: jax.Array | None = None) -> jax.Array:
        """valid: tokens that are no padding; the others take no room, are not counted, and no routed expert answers them."""
        c, width = self.config, x_BLD.shape[2]
        valid_BL = None if valid_BL is None else jnp.broadcast_to(valid_BL, x_BLD.shape[:2])
        logits_BLE, bias_E = self._logits(x_BLD)
        scores_BLE = c.router.scores(logits_BLE)
        weights = Kernels(c, width, self.gain, self.dtype, name="experts")()
        drop = self._dropout(rates)
        where = NOWHERE if drop else split_of(c, x_BLD.shape)
        routed = partial(_routed, c, drop, where)
        given = x_BLD.astype(self.dtype), scores_BLE, valid_BL, bias_E, weights
        y_BLD, load_BE, served_BL = (on_each_device(routed, where, weights) if where.axes else routed)(*given)
        self._sow(logits_BLE, scores_BLE, load_BE, served_BL, valid_BL)
        y_BLD = constrain(y_BLD, "batch", "length", "embed_act")
        return y_BLD if c.shared is None else y_BLD + MLP(c.shared, self.gain, self.dtype, name="shared")(x_BLD, rates)

    def _logits(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The router's logits and bias, in float32 whatever the compute dtype (float64 if that is)."""
        c, dtype = self.config, jnp.promote_types(self.dtype, jnp.float32)
        axes = ("embed", "expert")
        kernel, bias = Linear((x_BLD.shape[2],), (c.experts,), axes, bias=c.router.bias, dtype=dtype, name="router").weights()
        return product(x_BLD.astype(dtype), kernel), bias

    def _dropout(self, rates: Mapping[str, Any]):
        if "ffn" not in rates:
            return None
        key = self.make_rng("dropout")
        return lambda h: dropout(h, rates["ffn"], key)

    def _sow(self, logits_BLE, scores_BLE, load_BE, served_BL, valid_BL) -> None:
        c = self.config
        z = z_loss(logits_BLE, valid_BL)
        chosen, served = load_BE.sum(), served_BL.sum()
        if isinstance(c.router, ExpertChoice):
            chosen, served = z.weight, (served_BL > 0).sum()
        found = {
            "load": load_BE.sum(0),
            "dropped": Weighted(chosen - served, chosen),
            "balance": balance_loss(scores_BLE, load_BE, valid_BL, over=c.balance_over),
            "z_loss": z,
        }
        for name, value in found.items():
            self.sow("routing", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


class Where(NamedTuple):
    """How devices share the work: the mesh axes of rows and of tokens within a row, and along which, if any, they share experts."""

    rows: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    experts: str | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes whose devices have tokens of their own."""
        return self.rows + self.length


NOWHERE = Where()


def split_of(config: MoE, shape: tuple[int, ...]) -> Where:
    """How a mesh splits `[B, L, D]`, where every device can sort its own tokens."""
    if not (config.router.rowwise and config.dispatch.rowwise):
        return NOWHERE
    rows = axes_over("batch", shape[0])
    length = axes_over("length", shape[1]) if config.router.tokenwise and config.dispatch.tokenwise else ()
    shared = [axis for axis in axes_over("expert", config.experts) if axis in rows]
    return Where(rows, length, shared[0] if shared else None)


def _routed(config: MoE, drop: Any, where: Where, x_BLD, scores_BLE, valid_BL, bias_E, weights):
    """What the experts make of tokens `[B, L, D]`; how often each row chose each, `[B, E]`; and how many took a token, `[B, L]`."""
    rows, length, width = x_BLD.shape
    x_TD, scores_TE = x_BLD.reshape(-1, width), scores_BLE.reshape(rows * length, -1)
    valid_T = None if valid_BL is None else valid_BL.reshape(-1)
    plan = config.router.plan(scores_TE, bias_E, valid_T, active=config.active, rows=rows, dispatch=config.dispatch)
    x_MD, kept_M = plan.spread(x_TD), None
    if where.experts:
        away = plan.away(where.experts, parts((where.experts,)))
        y_MD = away.journey.back(network(config.expert, weights, away.journey.there(x_MD), away, drop))
        kept_M = away.kept_M
    else:
        y_MD = network(config.expert, weights, x_MD, plan, drop)
    load_BE = jax.lax.psum(plan.load_BE, where.length) if where.length else plan.load_BE
    return plan.collect(y_MD).reshape(x_BLD.shape), load_BE, plan.served(kept_M).reshape(rows, length)


def network(config: Dense | Gated, weights: Weights, x_MD: jax.Array, plan: Slots | Away, drop: Any) -> jax.Array:
    """Every slot's token through its expert, `[M, D] -> [M, D]`. drop: what is done to hidden units, or None."""

    def linear(x: jax.Array, *names: str) -> list[jax.Array]:
        kernels, biases = zip(*(weights[name] for name in names), strict=True)
        ys = plan.products(x, kernels)
        return [y if bias is None else y + bias[plan.expert_M] for y, bias in zip(ys, biases, strict=True)]

    first, *rest = linear(x_MD, *(name for name in ("gate", "up") if name in weights))
    h_MF = ACTIVATIONS[config.activation](first)
    if rest:
        h_MF = h_MF * rest[0]
    h_MF = constrain(h_MF, None, "hidden_act")
    return linear(h_MF if drop is None else drop(h_MF), "down")[0]


def on_each_device(routed: Any, where: Where, weights: Weights) -> Any:
    """`routed` on each device's tokens: they are sorted where they are, and travel only to experts of other devices.

    Weights are gathered inside, so that of the sum of their gradients a device gets no more than its part.
    """
    rows = PartitionSpec(where.rows or None)
    tokens = PartitionSpec(*rows, where.length or None)
    shares = {name: tuple(_share(x, axes, where) for x, axes in _named(name, pair)) for name, pair in weights.items()}

    def local(x_BLD, scores_BLE, valid_BL, bias_E, weights):
        whole = {
            name: tuple(_gathered(x, axes, share, where) for (x, axes), share in zip(_named(name, pair), shares[name], strict=True))
            for name, pair in weights.items()
        }
        return routed(x_BLD, scores_BLE, valid_BL, bias_E, whole)

    specs = (tokens, tokens, tokens, PartitionSpec(), shares)
    return jax.shard_map(local, in_specs=specs, out_specs=(tokens, rows, tokens), axis_names=set(where.axes), check_vma=False)


def _named(name: str, pair: tuple[jax.Array, jax.Array | None]) -> tuple[tuple[jax.Array | None, tuple[str, ...]], ...]:
    """A kernel and its bias, each with what its dimensions are called."""
    return (pair[0], ("expert", *AXES[name])), (pair[1], ("expert", AXES[name][1]))


def _share(x: jax.Array | None, names: tuple[str, ...], where: Where) -> PartitionSpec | None:
    """How an array lies over the axes whose devices have tokens of their own."""
    return None if x is None else spec_over(where.axes, names, x.shape)


def _gathered(x: jax.Array | None, names: tuple[str, ...], share: PartitionSpec | None, where: Where) -> jax.Array | None:
    """All of it that the device's experts have."""
    for place, axes in enumerate(share or ()):
        axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != where.experts)
        if axes and x is not None:
            message = partial(jax.lax.all_gather, axis_name=axes, axis=place, tiled=True)
            x = by_hand(message, x, *(None if at == place else name for at, name in enumerate(names)))
    return x
