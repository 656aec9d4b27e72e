"""The coordinate check of µP: how far a few steps move the activations of models of several widths (Yang et al. 2022, app. D.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import override, require
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import nameless
from llm_jax.lab.experiment import Experiment
from llm_jax.train.pretrain import trial

ROWS = 8  # sequences that are trained on and looked at


def coordinate_check(
    experiment: Experiment, widths: Sequence[int], *, steps: int = 4, vocabulary: int = 256, seeds: int = 2
) -> dict[str, list[float]]:
    """Activation → for each width the root mean square of its change in `steps` steps on random tokens, averaged over seeds.

    Activations are "embedding", "layer 0", … and "logits". In µP they change alike at all widths; else they grow with it.
    """
    require(len(widths) > 1, "widths", f"must be at least two, to be compared, got {len(widths)}")
    rows: list[dict[str, float]] = []
    for width in widths:
        runs = [_changes(override(experiment, {"model.width": width, "seed": seed}), steps, vocabulary) for seed in range(seeds)]
        rows.append({name: float(np.mean([run[name] for run in runs])) for name in runs[0]})
    return {name: [row[name] for row in rows] for name in rows[0]}


def growth(widths: Sequence[int], changes: dict[str, list[float]]) -> dict[str, float]:
    """Activation → the power of the width that its change grows with: 0 in µP, up to 1 without."""
    return {name: float(np.polyfit(np.log(widths), np.log(values), 1)[0]) for name, values in changes.items()}


def _changes(experiment: Experiment, steps: int, vocabulary: int) -> dict[str, float]:
    """Activation → root mean square of what `steps` steps changed of it."""
    given = override(experiment, {"model.layers": "unrolled", "train.steps": max(experiment.train.steps, steps)})
    tokens = nameless(vocabulary).with_specials(given.objective.specials)
    one = trial(given, tokens)
    ids = np.random.default_rng(experiment.seed).integers(0, vocabulary, (ROWS, experiment.data.sequence_length + 1))
    batch = Batch(jnp.asarray(ids[:, :-1], jnp.int32), jnp.asarray(ids[:, 1:], jnp.int32))
    values = {"seed": jnp.int32(experiment.seed)}
    state = jax.jit(one.init)(values)
    before = _activations(given, tokens.vocabulary, state.params, batch)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (steps, *x.shape)), batch)
    state, _ = jax.jit(one.steps)(values, state, many)
    after = _activations(given, tokens.vocabulary, state.params, batch)
    return {name: float(jnp.sqrt(jnp.square(after[name] - before[name]).mean())) for name in before}


def _activations(experiment: Experiment, vocabulary: int, params: Any, batch: Batch) -> dict[str, jax.Array]:
    model = experiment.model
    inputs, given = model.arguments(batch)
    network = model.build(vocabulary)
    logits, sown = network.apply({"params": params}, *inputs, **given, mutable=["intermediates"])
    kept = sown["intermediates"]
    layers = {f"layer {i}": kept[f"layers_{i}"]["stream"][0] for i in range(model.final.depth)}
    return {"embedding": kept["stream"][0], **layers, "logits": logits}
