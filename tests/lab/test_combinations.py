"""Every component is reached by `--set`, what is allowed trains, and what makes no sense is refused by a stated rule.

The factors of `combination_table` have about 10¹⁰ combinations. Of all pairs of their levels the configurations are built here, and
must be valid or refused by the rule that says so. One training step is made of rows in which every level occurs, and of every
variant by itself; under `slow` of rows in which every allowed pair occurs. Initialisation is only traced: parameters are random.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import Config, ConfigError
from llm_jax.core.types import Batch
from llm_jax.lab import components as exported
from llm_jax.lab.experiment import Experiment
from llm_jax.models import count
from llm_jax.models.model import unstack_layers
from llm_jax.train.check import name_of
from llm_jax.train.pretrain import trial
from tests.lab.combination_table import ALONE, FACTORS, LENGTH, REFUSED, ROWS, VOCABULARY, assignments, experiment, refusal
from tests.lab.covering import covering

LEVELS = list(FACTORS.values())
FIRST = [levels[0] for levels in LEVELS]
# a step runs once: what XLA:CPU spends on fast code is three quarters of the time
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def levels_of(row: Iterable[int]) -> list[str]:
    return [levels[number] for levels, number in zip(LEVELS, row, strict=True)]


def first_but(*items: tuple[int, int]) -> list[str]:
    """The first level of each factor but for some, given as (factor, level)."""
    return [levels[dict(items).get(factor, 0)] for factor, levels in enumerate(LEVELS)]


@cache
def rows(strength: int) -> list[tuple[int, ...]]:
    """In which everything occurs that the rules allow."""
    return covering([len(levels) for levels in LEVELS], lambda pair: not refusal(*(LEVELS[f][n] for f, n in pair)), strength)


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def batch() -> Batch:
    """Random tokens, in the second half of the rows of two documents."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, ROWS, LENGTH + 1)).astype(np.int32)
    second = (np.arange(LENGTH) >= LENGTH - 2)[None] & (np.arange(ROWS) >= ROWS // 2)[:, None]
    return Batch(ids[..., :-1], ids[..., 1:], segments=second[None].astype(np.int32), inputs=ids[..., ::-1][..., :-1])


def step(levels: Iterable[str]) -> str:
    """What is wrong with one step of the experiment's own trial, or nothing."""
    given = experiment(levels)
    one = trial(given, vocabulary=VOCABULARY, byte_lengths=np.ones(VOCABULARY, np.int32))
    shapes, rng = jax.eval_shape(one.init, {}), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes.params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes.step, shapes.opt_state))
    state = replace(shapes, step=zeros[0], params=params, opt_state=zeros[1], key=jax.random.key(0, impl="unsafe_rbg"))
    after, metrics = jax.jit(lambda state, data: one.steps({}, state, data), compiler_options=QUICK)(state, batch())
    loss, leaves = metrics["train/loss"].mean, jax.tree.leaves(after.params)
    if not np.isfinite(loss) or not all(np.isfinite(leaf).all() for leaf in leaves):
        return f"the loss {loss} and all parameters should be finite"
    counted, size = count.parameters(given.model, VOCABULARY), sum(leaf.size for leaf in leaves)
    if counted != size:
        return f"it counts {counted} parameters and has {size}"
    (grads,) = (tree for kind in ("trace", "mu") if (tree := optax.tree.get(after.opt_state, kind)) is not None)
    found = jax.tree_util.tree_leaves_with_path(unstack_layers(jax.device_get(grads), given.model))
    sizes = {name_of(path): float(np.abs(leaf).max()) for path, leaf in found}
    still = [name for name, size in sizes.items() if size <= 1e-7 * max(sizes.values()) and not by_design(name, given)]
    return f"no gradient reaches {', '.join(still)}" if still else ""


def by_design(name: str, given: Experiment) -> bool:
    """Whether a parameter needs no gradient."""
    return (
        name.endswith("router/bias")  # moved by loads, not by the loss
        # the copies are equal before the first branch, whose norm undoes what their weights sum to
        or re.search(r"layers_0/residual_attention/read(_kernel)?$", name) is not None
        # the same for all keys, so the softmax undoes it
        or name.endswith("key/bias")
    )


def wrong(many: Iterable[Iterable[str]]) -> str:
    """Every row that fails, as one would run it."""
    found = []
    for levels in many:
        try:
            problem = step(levels)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            found.append(" ".join(f"--set='{text}'" for text in assignments(levels)) + f"\n    {problem}")
    return "\n".join(found)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_every_level_trains(part):
    many = [levels_of(row) for row in rows(1)] + [[*FIRST, *variant] for variant in ALONE]
    assert not (found := wrong(many[part::4])), found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(8))
def test_every_allowed_pair_trains(part):
    assert not (found := wrong(levels_of(row) for row in rows(2)[part::8])), found
