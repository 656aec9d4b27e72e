"""Every component is reached by `--set`, combinations that are allowed train, and those that make no sense are refused.

All allowed combinations are too many to run (about 10¹⁰). By default one training step is made of rows in which every pair of
levels of all factors in `combination_table` occurs that is allowed, and of every variant by itself.
"""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import Config, ConfigError, override_text
from llm_jax.core.types import Batch
from llm_jax.lab import components as all_components
from llm_jax.models import count
from llm_jax.models.model import unstack_layers
from llm_jax.train.check import compiled, moved, name_of
from llm_jax.train.pretrain import trial
from tests.lab.combination_table import (
    ALONE,
    FACTORS,
    LENGTH,
    REFUSED,
    ROWS,
    VOCABULARY,
    assignments,
    base,
    experiment,
    refusal,
)
from tests.lab.covering import covering

LEVELS = list(FACTORS.values())
FIRST = [levels[0] for levels in LEVELS]


def levels_of(row) -> list[str]:
    return [levels[number] for levels, number in zip(LEVELS, row, strict=True)]


def changed(items) -> list[str]:
    """The first levels but for some, given as (factor, level)."""
    given = dict(items)
    return [levels[given.get(factor, 0)] for factor, levels in enumerate(LEVELS)]


@cache
def rows(strength: int) -> list[tuple[int, ...]]:
    return covering([len(levels) for levels in LEVELS], lambda pair: not refusal(*(LEVELS[f][n] for f, n in pair)), strength)


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def batch() -> Batch:
    """Random tokens, in the second half of the rows of two documents."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, ROWS, LENGTH + 1)).astype(np.int32)
    second = (np.arange(LENGTH) >= LENGTH - 2)[None] & (np.arange(ROWS) >= ROWS // 2)[:, None]
    return Batch(ids[..., :-1], ids[..., 1:], segments=second[None].astype(np.int32), inputs=ids[..., ::-1][..., :-1])


def step(levels) -> str:
    """What is wrong with one step of the experiment's own trial, from parameters away from where things are switched off."""
    given = experiment(levels)
    model = given.model
    one = trial(given, vocabulary=VOCABULARY, byte_lengths=np.ones(VOCABULARY, np.int32))

    def run(noise, batches):
        state = one.init({})
        params = jax.tree.map(lambda leaf, by: leaf + 0.1 * by, state.params, noise)
        after, metrics = one.steps({}, replace(state, params=params), batches)
        grads = optax.tree.get(after.opt_state, "mu")
        return metrics["train/loss"].mean, after.params, unstack_layers(grads, model)

    shapes = jax.eval_shape(lambda: one.init({}).params)
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    loss, params, grads = jax.device_get(compiled(run)(noise, batch()))
    if not np.isfinite(loss) or not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        return f"loss {loss} and parameters should be finite"
    counted, size = count.parameters(model, VOCABULARY), sum(leaf.size for leaf in jax.tree.leaves(params))
    if counted != size:
        return f"counts {counted} parameters of {size}"
    leaves = {name_of(path): np.abs(leaf).max() for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    least = 1e-7 * max(leaves.values())
    still = [name for name, size in leaves.items() if size <= least and not at_rest(name, given)]
    return f"no gradient reaches {', '.join(still)}" if still else ""


def at_rest(name: str, given) -> bool:
    """Whether a parameter has no gradient by its design."""
    return False
