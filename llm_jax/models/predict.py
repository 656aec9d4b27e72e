"""A model as a function of parameters and a batch: what objectives call."""

from __future__ import annotations

from typing import Any

import jax

from llm_jax.core.types import Batch, Predictions
from llm_jax.models import experts
from llm_jax.models.model import Model
from llm_jax.nn.kernels.unembedding import Unembedding


def hidden_states(model: Model, vocabulary: int, params: Any, batch: Batch) -> jax.Array:
    """`[B, L, D]`: what the head would read of each token; of an encoder-decoder what its decoder would, of the encoder."""
    network, variables = model.build(vocabulary), {"params": params}
    if model.encodes:
        read = {"positions_BM": batch.positions, "segments_BM": batch.segments}
        return network.apply(variables, batch.tokens, **read, method="encode").hidden
    inputs, given = model.arguments(batch)
    _, sown = network.apply(variables, *inputs, **given, mutable=["intermediates"])
    return sown["intermediates"]["hidden"][0]


def predict(model: Model, vocabulary: int, params: Any, batch: Batch, rng: jax.Array, *, train: bool) -> Predictions:
    """The logits and what they are made of; in training with dropout, and with what else the loss asks for."""
    network, (inputs, given) = model.build(vocabulary), model.arguments(batch)
    if train:
        given = given | {"deterministic": False, "rngs": {"dropout": rng}}
    collections = ["unembedding", "routing", "ahead"] if train else ["unembedding"]
    logits, sown = network.apply({"params": params}, *inputs, **given, mutable=collections)
    parts = jax.tree.leaves(sown.get("unembedding", {}), is_leaf=lambda x: isinstance(x, Unembedding))  # in the order of the calls
    if not train:
        return Predictions(logits, unembeddings=tuple(parts))
    routing = sown.get("routing", {})
    ahead = sown.get("ahead", {}).get("head", {})
    steps = tuple(ahead[name] for name in sorted(ahead, key=lambda name: int(name.rpartition("_")[2])))
    return Predictions(logits, steps, experts.penalty(model, routing), routing, tuple(parts))
