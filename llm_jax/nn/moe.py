"""Mixture of experts (Shazeer et al. 2017): feed-forward networks of which every token uses a few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.config import require, require_positive, traced
from llm_jax.core.sharding import constrain, partitioned, splitting
from llm_jax.core.types import Weighted
from llm_jax.nn.activations import ACTIVATIONS
from llm_jax.nn.dispatch import Dispatch, Dropless, Over, Slots
from llm_jax.nn.dropout import dropout
from llm_jax.nn.ffn import MLP, Dense, FeedForward, Gated
from llm_jax.nn.kernels.product import product
from llm_jax.nn.linear import Linear, normal
from llm_jax.nn.routing import ExpertChoice, Router, Softmax, balance_loss, z_loss

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

        def bank(name: str, inputs: int, outputs: int, axes: tuple[str, str], gain: float = 1.0):
            return Bank(c.experts, inputs, outputs, axes, gain, c.expert.bias, self.dtype, name=name)()

        ups = ("gate", "up") if c.expert.branches == 2 else ("up",)
        weights = {name: bank(name, self.width, hidden, ("embed", "hidden")) for name in ups}
        return weights | {"down": bank("down", hidden, self.width, ("hidden", "embed"), self.gain)}


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
        c, (rows, length, width) = self.config, x_BLD.shape
        x_TD = x_BLD.reshape(-1, width)
        valid_T = None if valid_BL is None else jnp.broadcast_to(valid_BL, (rows, length)).reshape(-1)
        logits_TE, bias_E = self._logits(x_TD)
        scores_TE = c.router.scores(logits_TE)
        weights = Kernels(c, width, self.gain, self.dtype, name="experts")()
        drop = self._dropout(rates)

        def routed(x_TD, scores_TE, valid_T, bias_E, weights):
            here = len(x_TD) // length
            plan = c.router.plan(scores_TE, bias_E, valid_T, active=c.active, rows=here, dispatch=c.dispatch)
            y_MD = network(c.expert, weights, plan.spread(x_TD), plan, drop)
            return plan.collect(y_MD), plan.load_BE, plan.served_T

        alone = c.router.rowwise and c.dispatch.rowwise and drop is None
        if alone:
            routed = on_each_devices_rows(routed, rows)
        y_TD, load_BE, served_T = routed(x_TD.astype(self.dtype), scores_TE, valid_T, bias_E, weights)
        self._sow(logits_TE, scores_TE, load_BE, served_T, valid_T)
        y_BLD = constrain(y_TD.reshape(x_BLD.shape), "batch", "length", "embed_act")
        return y_BLD if c.shared is None else y_BLD + MLP(c.shared, self.gain, self.dtype, name="shared")(x_BLD, rates)

    def _logits(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The router's logits and bias, in float32 whatever the compute dtype (float64 if that is)."""
        c, dtype = self.config, jnp.promote_types(self.dtype, jnp.float32)
        axes = ("embed", "expert")
        kernel, bias = Linear((x_TD.shape[1],), (c.experts,), axes, bias=c.router.bias, dtype=dtype, name="router").weights()
        return product(x_TD.astype(dtype), kernel), bias

    def _dropout(self, rates: Mapping[str, Any]):
        if "ffn" not in rates:
            return None
        key = self.make_rng("dropout")
        return lambda h: dropout(h, rates["ffn"], key)

    def _sow(self, logits_TE, scores_TE, load_BE, served_T, valid_T) -> None:
        c = self.config
        z = z_loss(logits_TE, valid_T)
        chosen, served = load_BE.sum(), served_T.sum()
        if isinstance(c.router, ExpertChoice):
            chosen, served = z.weight, (served_T > 0).sum()
        found = {
            "load": load_BE.sum(0),
            "dropped": Weighted(chosen - served, chosen),
            "balance": balance_loss(scores_TE, load_BE, valid_T, over=c.balance_over),
            "z_loss": z,
        }
        for name, value in found.items():
            self.sow("routing", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def network(config: Dense | Gated, weights: Weights, x_MD: jax.Array, plan: Slots, drop: Any) -> jax.Array:
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


def on_each_devices_rows(routed: Any, rows: int) -> Any:
    """`routed` on each device's rows, where a mesh splits the batch evenly: tokens are sorted where they are, and none travels."""
    axes = splitting("batch", rows)
    if not axes:
        return routed
    split, whole = PartitionSpec(axes), PartitionSpec()
    specs = (split, split, split, whole, whole)
    return jax.shard_map(routed, in_specs=specs, out_specs=split, axis_names=set(axes), check_vma=False)
