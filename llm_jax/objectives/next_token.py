"""Next-token prediction with teacher forcing, and several tokens ahead where the model has a head for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from llm_jax.core.config import require, require_fraction, substitute, traced, traced_values
from llm_jax.core.types import Batch, Predictions, Weighted
from llm_jax.nn.kernels import blocks
from llm_jax.nn.losses import Criterion, CrossEntropy, cross_entropy, smoothed
from llm_jax.nn.scores import calibration_error, calibration_sums, confidence, rank
from llm_jax.objectives.objective import Objective, Predicts

TOP = 5  # the most probable tokens among which the target is looked for


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean loss of each token after those before it, which by default is its negative log-likelihood.

    criterion: the loss of a token. smoothing: this part of a target's probability is spread evenly over all ids (Vaswani et al.
    2017, §5.4). z_loss: weight of (log Σ exp logits)², which keeps the logits from drifting (Chowdhery et al. 2022, §5). None of
    them is ever evaluated. Where logits are many (`Traits.logits_at_once`) they are made of a few tokens at a time.
    ahead: weight of the mean loss of the tokens after the next one, where the head predicts them (DeepSeek-V3 2024, eq. 25).
    after: only what follows this token id, `skip` others in between, is learned and scored, such as an answer; None: every token.
    """

    criterion: Criterion = field(default_factory=CrossEntropy)
    smoothing: float = traced(0.0)
    z_loss: float = traced(0.0)
    ahead: float = traced(0.3)
    after: int | None = None
    skip: int = 0

    scores = ("loss", "bits_per_byte", "accuracy", "top5_accuracy", "calibration_error")

    def validate(self):
        require_fraction(self, "smoothing")
        sharp = not self.smoothing or isinstance(self.criterion, CrossEntropy)
        require(sharp, "smoothing", f"softens the target of CrossEntropy(): set it to 0 with {type(self.criterion).__name__}()")
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
        """Evaluation reports "loss" (the cross-entropy, nats a token), "bits_per_byte" = Σ nll / (ln 2 · Σ bytes), which compares
        across tokenizers (ids that stand for no text, such as the end of a document, cost bits but count no byte), "accuracy",
        "top5_accuracy", and "calibration_error" (of the most probable token, in 15 bins).
        """
        said = apply(params, batch, rng)
        batch = self._only(batch)
        if train:
            main = Weighted(self._summed(said, 0, batch.targets, _weights(batch)), _weights(batch).sum())
            metrics = {"routing": said.routing} if said.routing else {}
            return Weighted(main.total + self._later(said, batch) + _penalty(said, main.weight), main.weight), metrics
        return _scored(said, batch, byte_lengths)

    def concluded(self, sums):
        found = dict(sums)
        return found | {"calibration_error": calibration_error(found.pop("calibration_error"))}

    def _only(self, batch: Batch) -> Batch:
        """The batch in which nothing counts but the targets that are asked for."""
        if self.after is None:
            return batch
        asks_BL = jnp.pad(batch.tokens == self.after, ((0, 0), (self.skip, 0)))[:, : batch.tokens.shape[1]]
        if batch.segments is not None:  # not what another document asked
            asks_BL &= batch.segments == jnp.pad(batch.segments, ((0, 0), (self.skip, 0)))[:, : batch.tokens.shape[1]]
        answers_BL = asks_BL.astype(jnp.float32)
        return replace(batch, weights=answers_BL if batch.weights is None else batch.weights * answers_BL)

    def _each(self, step: int, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each token after `step` others, `[..., V]` to `[...]`; smoothing and z-loss are the next token's alone.

        What is known to be zero costs nothing.
        """
        loss = self.criterion(logits, targets)
        if step or (_is_zero(self.smoothing) and _is_zero(self.z_loss)):
            return loss
        nll, log_sum = cross_entropy(logits, targets)
        if not _is_zero(self.smoothing):
            loss = smoothed(nll, log_sum, logits, self.smoothing)
        return loss if _is_zero(self.z_loss) else loss + self.z_loss * jnp.square(log_sum)

    def _summed(self, said: Predictions, step: int, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        """Σ weight · loss of what is said of the token after `step` others."""
        if at_once(said, step):
            return (self._each(step, (said.logits, *said.ahead)[step], targets_BL) * weights_BL).sum()
        values = traced_values(self, jax.Array)
        judge = lambda values, logits_NV, targets_N: substitute(self, values)._each(step, logits_NV, targets_N)  # noqa: E731
        return blocks.total(judge, said.unembeddings[step], targets_BL, weights_BL, values)

    def _later(self, said: Predictions, batch: Batch) -> jax.Array | float:
        """Σ of the weighted losses of the tokens after the next one; those outside the document count nothing.

        Nor do those that are seen: step k puts token i + k into place i, and a prefix's places are seen from before them.
        """
        total = 0.0
        for step in range(1, len(said.ahead) + 1):
            inside = jnp.arange(batch.targets.shape[1])[None] < batch.targets.shape[1] - step
            if batch.segments is not None:
                inside = inside & (jnp.roll(batch.segments, -step, 1) == batch.segments)
            if batch.prefix is not None:
                inside = inside & ~jnp.roll(batch.prefix, -1, 1)
            weights_BL = inside * jnp.roll(_weights(batch), -step, 1)
            total = total + self.ahead / len(said.ahead) * self._summed(said, step, jnp.roll(batch.targets, -step, 1), weights_BL)
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


def at_once(said: Predictions, step: int) -> bool:
    """Whether the logits of the token after `step` others may all be made."""
    return not said.unembeddings or blocks.at_once(said.unembeddings[step])


def _scored(said: Predictions, batch: Batch, byte_lengths: jax.Array) -> tuple[Weighted, dict[str, Weighted]]:
    def judge(_, logits, targets):
        return cross_entropy(logits, targets)[0], rank(logits, targets), confidence(logits)

    if at_once(said, 0):
        nll_BL, rank_BL, sure_BL = judge({}, said.logits, batch.targets)
    else:
        nll_BL, rank_BL, sure_BL = blocks.each(judge, said.unembeddings[0], batch.targets, {})
    weights_BL = _weights(batch)
    mean = lambda values_BL: Weighted((values_BL * weights_BL).sum(), weights_BL.sum())  # noqa: E731
    loss, hits_BL = mean(nll_BL), (rank_BL < 1).astype(jnp.float32)
    bits = Weighted(loss.total / math.log(2), mean(byte_lengths[batch.targets].astype(jnp.float32)).total)
    among_BL = (rank_BL < TOP).astype(jnp.float32)
    calibration = calibration_sums(sure_BL, hits_BL, weights_BL)
    scores = {"loss": loss, "bits_per_byte": bits, "accuracy": mean(hits_BL), "top5_accuracy": mean(among_BL)}
    return loss, scores | {"calibration_error": calibration}


def _weights(batch: Batch) -> jax.Array:
    """`[B, L]`: how often each target counts."""
    return jnp.ones(batch.targets.shape, jnp.float32) if batch.weights is None else batch.weights
