"""Next-token prediction with teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, traced
from llm_jax.core.types import Batch, Metrics, Weighted
from llm_jax.nn.losses import cross_entropy

Apply = Callable[[Any, Batch, jax.Array], jax.Array]  # (params, batch, rng) -> logits [B, L, V]


@dataclass(frozen=True)
class NextToken(Config):
    """The mean negative log-likelihood of each token after those before it.

    z_loss: weight of (log Σ exp logits)², which keeps the logits from drifting (Chowdhery et al. 2022, §5); never evaluated.
    """

    z_loss: float = traced(0.0)

    scores = ("loss", "bits_per_byte", "accuracy")  # what evaluation reports

    def validate(self):
        require(self.z_loss >= 0, "z_loss", f"must be >= 0, got {self.z_loss}")

    def loss(
        self, apply: Apply, params: Any, batch: Batch, *, rng: jax.Array, byte_lengths: jax.Array, train: bool
    ) -> tuple[Weighted, Metrics]:
        """The summed loss over its weight, and metrics. byte_lengths `[V]`: bytes of text that each id stands for.

        Evaluation reports "loss" (nats a token), "bits_per_byte" = Σ nll / (ln 2 · Σ bytes), which compares across tokenizers
        (ids that stand for no text, such as the end of a document, cost bits but count no byte), and "accuracy".
        """
        logits_BLV = apply(params, batch, rng)
        nll_BL, log_sum_BL = cross_entropy(logits_BLV, batch.targets)
        if train:
            elided = isinstance(self.z_loss, (int, float)) and self.z_loss == 0
            return _weighted(nll_BL if elided else nll_BL + self.z_loss * jnp.square(log_sum_BL), batch.weights), {}
        loss = _weighted(nll_BL, batch.weights)
        bytes_BL = byte_lengths[batch.targets].astype(jnp.float32)
        hits = _weighted((logits_BLV.argmax(-1) == batch.targets).astype(jnp.float32), batch.weights)
        bits = Weighted(loss.total / math.log(2), _weighted(bytes_BL, batch.weights).total)
        return loss, {"loss": loss, "bits_per_byte": bits, "accuracy": hits}


def _weighted(values_BL: jax.Array, weights_BL: jax.Array | None) -> Weighted:
    if weights_BL is None:
        return Weighted(values_BL.sum(), jnp.float32(values_BL.size))
    return Weighted((values_BL * weights_BL).sum(), weights_BL.sum())
