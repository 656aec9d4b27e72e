"""Which experts a token goes to and with which weight, and what keeps their loads even. Everything in float32."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive, traced
from llm_jax.core.types import Weighted
from llm_jax.nn.dispatch import Dispatch, Over, Slots, take
from llm_jax.nn.kernels.product import softmax


@dataclass(frozen=True)
class Router(Config):
    """How logits become a choice of experts. causal: whether a token's choice depends on no later token."""

    abstract = True
    causal = True
    bias = False  # a learned-by-counting bias [E] for the choice

    def check(self, experts: int, active: int) -> None:
        """Raises `ConfigError` unless it can choose `active` of so many experts."""

    @property
    def rowwise(self) -> bool:
        """Whether each row's tokens are routed for themselves."""
        return True

    @property
    def tokenwise(self) -> bool:
        """Whether each token is."""
        return True

    def scores(self, logits_TE: jax.Array) -> jax.Array:
        """How well each expert suits each token, `[T, E]`, all positive."""
        return softmax(logits_TE)

    def plan(
        self,
        scores_TE: jax.Array,
        bias_E: jax.Array | None,
        valid_T: jax.Array | None,
        *,
        active: int,
        rows: int,
        dispatch: Dispatch,
    ) -> Slots:
        """Who goes where. Tokens that are not valid go nowhere."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenChoice(Router):
    """Every token takes the `active` experts of the highest scores.

    renormalize: the weights of the chosen are divided by their sum. scale: then multiplied by. groups: experts stand in so many
    groups, and a token chooses within the `active_groups` best of them only, so that it travels to few devices.
    """

    abstract = True
    counted = 1  # a group is as good as the sum of so many of its best scores

    renormalize: bool = True
    groups: int = 1
    active_groups: int = 1
    scale: float = 1.0

    def validate(self):
        require_positive(self, "groups", "active_groups", "scale")
        least = f"must be at most groups={self.groups}, got {self.active_groups}"
        require(self.active_groups <= self.groups, "active_groups", least)

    def check(self, experts, active):
        require(experts % self.groups == 0, "router.groups", f"must divide experts={experts}, got {self.groups}")
        room = experts // self.groups * self.active_groups
        require(active <= room, "router.active_groups", f"leaves {room} experts to choose {active} from: raise it")

    def choose(self, scores_TE: jax.Array, bias_E: jax.Array | None, active: int) -> tuple[jax.Array, jax.Array]:
        """Chosen experts `[T, K]` int32, best first, and their weights `[T, K]`. The bias moves the choice, not the weights."""
        ranking_TE = jax.lax.stop_gradient(scores_TE if bias_E is None else scores_TE + bias_E[None])
        if self.active_groups < self.groups:
            ranking_TE = self._within_best_groups(ranking_TE)
        expert_TK = jax.lax.top_k(ranking_TE, active)[1]
        weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
        if self.renormalize:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
        return expert_TK, weight_TK * self.scale

    def plan(self, scores_TE, bias_E, valid_T, *, active, rows, dispatch):
        expert_TK, weight_TK = self.choose(scores_TE, bias_E, active)
        return dispatch.plan(expert_TK, weight_TK, valid_T, experts=scores_TE.shape[1], rows=rows)

    def _within_best_groups(self, ranking_TE: jax.Array) -> jax.Array:
        ranking_TGX = ranking_TE.reshape(len(ranking_TE), self.groups, -1)
        best_TGN = jax.lax.top_k(ranking_TGX, min(self.counted, ranking_TGX.shape[-1]))[0]
        group_TN = jax.lax.top_k(best_TGN.sum(-1), self.active_groups)[1]
        open_TG = (group_TN[:, :, None] == jnp.arange(self.groups)[None, None]).any(1)
        return jnp.where(open_TG[:, :, None], ranking_TGX, -jnp.inf).reshape(ranking_TE.shape)


@dataclass(frozen=True)
class Softmax(TokenChoice):
    """Scores are a softmax over all experts: Shazeer et al. 2017; Mixtral (Jiang et al. 2024); Qwen3-MoE.

    Renormalized it is the softmax over the chosen logits alone. A group is as good as its best expert: DeepSeek-V2 (2024, §2.2.2).
    """


@dataclass(frozen=True)
class Sigmoid(TokenChoice):
    """Scores are sigmoids, each expert's for itself: DeepSeek-V3 (2024, §2.1.2). A group is as good as its two best experts.

    bias: experts carry a bias for the choice that no loss trains; `updated_bias` moves it by bias_rate a step (Wang et al. 2024).
    """

    counted = 2

    bias: bool = False
    bias_rate: float = traced(0.001)

    def validate(self):
        super().validate()
        require(self.bias_rate >= 0, "bias_rate", f"must be >= 0, got {self.bias_rate}")

    def scores(self, logits_TE):
        return jax.nn.sigmoid(logits_TE)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Every expert takes the tokens that score highest with it, as many as the others: Zhou et al. 2022.

    An expert takes capacity × active × tokens / experts of the batch's tokens (`over` "row": of each row's), so loads are even by
    construction. The choice compares a token with later ones: a model that generates token by token cannot repeat it.
    """

    causal = False

    capacity: float = 1.0
    over: Over = "batch"

    def validate(self):
        require_positive(self, "capacity")

    @property
    def rowwise(self):
        return self.over == "row"

    @property
    def tokenwise(self):
        return False

    def plan(self, scores_TE, bias_E, valid_T, *, active, rows, dispatch):
        share = self.capacity * active / scores_TE.shape[1]
        return take(scores_TE, valid_T, share=share, groups=rows if self.over == "row" else 1, rows=rows)


def balance_loss(scores_BLE: jax.Array, load_BE: jax.Array, valid_BL: jax.Array | None, *, over: Over = "batch") -> Weighted:
    """E · Σ_e (share of tokens that chose e) · (mean score of e), a token's scores divided by their sum, once for every token.

    Fedus et al. 2021, eq. 4–6, with all k choices counted as Mixtral does: k where loads are even. over "row": the mean over
    sequences of each one's own loss, DeepSeek-V3 eq. 17–20 but for the factor 1/k. It is not linear: the sums of
    micro-batches are those of their own losses, not of the whole batch's.
    """
    counted_BL = jnp.ones(scores_BLE.shape[:2], scores_BLE.dtype) if valid_BL is None else valid_BL.astype(scores_BLE.dtype)
    share_BLE = scores_BLE / (scores_BLE.sum(-1, keepdims=True) + 1e-20) * counted_BL[..., None]
    score_GE, count_G, load_GE = share_BLE.sum(1), counted_BL.sum(1), jax.lax.stop_gradient(load_BE)
    if over == "batch":
        score_GE, count_G, load_GE = (x.sum(0, keepdims=True) for x in (score_GE, count_G, load_GE))
    total = (scores_BLE.shape[-1] * (load_GE * score_GE).sum(-1) / jnp.maximum(count_G, 1)).sum()
    return Weighted(total, counted_BL.sum())


def z_loss(logits: jax.Array, valid: jax.Array | None) -> Weighted:
    """(log Σ exp logits)² of every token, `[..., E]`, which keeps the router's logits small: Zoph et al. 2022, ST-MoE, eq. 5."""
    square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    counted = jnp.ones_like(square) if valid is None else valid.astype(square.dtype)
    return Weighted((square * counted).sum(), counted.sum())


def updated_bias(bias_E: jax.Array, load_E: jax.Array, rate) -> jax.Array:
    """bias + rate · sign(mean load - load): experts that too few tokens chose get chosen more. Wang et al. 2024, algorithm 1.

    `[..., E]` both; load: choices counted over a whole batch, all its micro-batches and devices.
    """
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
