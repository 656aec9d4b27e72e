"""A model as a function of parameters and a batch: what objectives call."""

from __future__ import annotations

from typing import Any

import jax

from llm_jax.core.types import Batch, Predictions
from llm_jax.models import experts
from llm_jax.models.model import Model


def predict(model: Model, vocabulary: int, params: Any, batch: Batch, rng: jax.Array, *, train: bool) -> Predictions:
    """The logits; in training with dropout, and with what else the loss asks for."""
    network, (inputs, given) = model.build(vocabulary), model.arguments(batch)
    if not train:
        return Predictions(network.apply({"params": params}, *inputs, **given))
    logits, sown = network.apply(
        {"params": params}, *inputs, **given, deterministic=False, rngs={"dropout": rng}, mutable=["routing", "ahead"]
    )
    routing = sown.get("routing", {})
    ahead = sown.get("ahead", {}).get("head", {})
    steps = tuple(ahead[name] for name in sorted(ahead, key=lambda name: int(name.rpartition("_")[2])))
    return Predictions(logits, steps, experts.penalty(model, routing), routing)
