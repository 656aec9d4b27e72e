"""Next-token prediction with teacher forcing, and several tokens ahead where the model has a head for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llm_jax.core.config import require, require_fraction, traced
from llm_jax.core.types import Batch, Predictions, Weighted
from llm_jax.nn.losses import cross_entropy
from llm_jax.objectives.objective import Objective, Predicts


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean negative log-likelihood of each token after those before it.

    smoothing: this part of a target's probability is spread evenly over all ids (Vaswani et al. 2017, §5.4). z_loss: weight of
    (log Σ exp logits)², which keeps the logits from drifting (Chowdhery et al. 2022, §5). Neither is ever evaluated.
    ahead: weight of the mean loss of the tokens after the next one, where the head predicts them (DeepSeek-V3 2024, eq. 25).
    after: only what follows this token id, `skip` others in between, is learned and scored, such as an answer; None: every token.
    """

    smoothing: float = traced(0.0)
    z_loss: float = traced(0.0)
    ahead: float = traced(0.3)
    after: int | None = None
    skip: int = 0

    scores = ("loss", "bits_per_byte", "accuracy")

    def validate(self):
        require_fraction(self, "smoothing")
        require(self.z_loss >= 0, "z_loss", f"must be >= 0, got {self.z_loss}")
        require(self.ahead >= 0, "ahead", f"must be >= 0, got {self.ahead}")
        require(self.after is None or self.after >= 0, "after", f"must be a token id, got {self.after}")
        require(self.skip >= 0, "skip", f"must be >= 0, got {self.skip}")

    def check(self, model):
        require(model.head.words, "model.head", "must score token ids to predict the next one: take LanguageModel()")
        require(not model.encodes, "objective", "has no input for an encoder: take Continuation(), or a Decoder as the model")
        check_blind(model)
        given = "is Prefix(), and NextToken() gives no prefix to see: take Causal(), or the objective Continuation()"
        require(not model.prefix_mask, f"model.{model.prefix_mask}", given)

    def loss(self, apply, params, batch, *, model, rng, byte_lengths, train):
        """Evaluation reports "loss" (nats a token), "bits_per_byte" = Σ nll / (ln 2 · Σ bytes), which compares across tokenizers
        (ids that stand for no text, such as the end of a document, cost bits but count no byte), and "accuracy".
        """
        said = apply(params, batch, rng)
        batch = self._only(batch)
        nll_BL, log_sum_BL = cross_entropy(said.logits, batch.targets)
        if train:
            main = _weighted(self._trained(said.logits, nll_BL, log_sum_BL), batch.weights)
            metrics = {"routing": said.routing} if said.routing else {}
            return Weighted(main.total + self._later(said, batch) + _penalty(said, main.weight), main.weight), metrics
        loss = _weighted(nll_BL, batch.weights)
        bytes_BL = byte_lengths[batch.targets].astype(jnp.float32)
        hits = _weighted((said.logits.argmax(-1) == batch.targets).astype(jnp.float32), batch.weights)
        bits = Weighted(loss.total / math.log(2), _weighted(bytes_BL, batch.weights).total)
        return loss, {"loss": loss, "bits_per_byte": bits, "accuracy": hits}

    def _only(self, batch: Batch) -> Batch:
        """The batch in which nothing counts but the targets that are asked for."""
        if self.after is None:
            return batch
        asks_BL = jnp.pad(batch.tokens == self.after, ((0, 0), (self.skip, 0)))[:, : batch.tokens.shape[1]]
        answers_BL = asks_BL.astype(jnp.float32)
        return replace(batch, weights=answers_BL if batch.weights is None else batch.weights * answers_BL)

    def _trained(self, logits_BLV: jax.Array, nll_BL: jax.Array, log_sum_BL: jax.Array) -> jax.Array:
        """The loss of each token: (1 - s)·nll + s·mean over ids of -log p, + z. What is known to be zero costs nothing."""
        if not _is_zero(self.smoothing):
            uniform_BL = log_sum_BL - logits_BLV.mean(-1)
            nll_BL = (1 - self.smoothing) * nll_BL + self.smoothing * uniform_BL
        return nll_BL if _is_zero(self.z_loss) else nll_BL + self.z_loss * jnp.square(log_sum_BL)

    def _later(self, said: Predictions, batch: Batch) -> jax.Array | float:
        """Σ of the weighted losses of the tokens after the next one; those outside the document count nothing.

        Nor do those that are seen: step k puts token i + k into place i, and a prefix's places are seen from before them.
        """
        total = 0.0
        for step, logits_BLV in enumerate(said.ahead, 1):
            inside = jnp.arange(batch.targets.shape[1])[None] < batch.targets.shape[1] - step
            if batch.segments is not None:
                inside = inside & (jnp.roll(batch.segments, -step, 1) == batch.segments)
            if batch.prefix is not None:
                inside = inside & ~jnp.roll(batch.prefix, -1, 1)
            weights_BL = 1.0 if batch.weights is None else jnp.roll(batch.weights, -step, 1)
            nll_BL = cross_entropy(logits_BLV, jnp.roll(batch.targets, -step, 1))[0]
            total = total + self.ahead / len(said.ahead) * (nll_BL * inside * weights_BL).sum()
        return total


def check_blind(model: Predicts) -> None:
    """Raises `ConfigError` where a token sees those that it is to predict."""
    part = model.sees_later
    way = (
        "take Dropless(), Capacity(over='row', priority='position'), or a router by which tokens choose"
        if part.endswith("ffn")
        else "take a causal mask"
    )
    require(not part, f"model.{part}", f"lets a token see those it is to predict: {way}")


def _penalty(said: Predictions, weight: jax.Array) -> jax.Array | float:
    """The model's own losses as if each counted token had its share."""
    return 0.0 if said.penalty is None else said.penalty.mean * weight


def _is_zero(value) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _weighted(values_BL: jax.Array, weights_BL: jax.Array | None) -> Weighted:
    if weights_BL is None:
        return Weighted(values_BL.sum(), jnp.float32(values_BL.size))
    return Weighted((values_BL * weights_BL).sum(), weights_BL.sum())
