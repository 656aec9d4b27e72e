"""The Transformer of 2017, trained as it was by configuration alone: what its preset's docstring says runs and learns."""

import textwrap

import jax
import numpy as np
import pytest

from llm_jax.core.config import override
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import nameless
from llm_jax.lab import components
from llm_jax.lab.experiment import Experiment
from llm_jax.models.presets import transformer_2017
from llm_jax.optim import optimizers, schedules
from llm_jax.train.pretrain import Train, trial

V, LENGTH, ROWS, STEPS = 16, 12, 16, 300
SMALL = {"width": 32, "depth": 1, "attention.heads": 2, "ffn.units": 64}


@pytest.mark.slow
def test_the_original_learns_to_repeat_what_its_encoder_reads():
    recipe = textwrap.dedent(transformer_2017.__doc__.split("goes on:")[1])
    names = (
        vars(components)
        | vars(optimizers)
        | vars(schedules)
        | {"Experiment": Experiment, "Train": Train, "transformer_2017": transformer_2017}
    )
    original = eval(recipe.strip(), names)
    assert (original.objective.smoothing, original.optimizer.b2, original.schedule.warmup) == (0.1, 0.98, 4000)
    assert original.model.encoder.placement == original.model.decoder.placement == "post"
    smaller = {f"model.{tower}.{path}": value for tower in ("encoder", "decoder") for path, value in SMALL.items()}
    rhythm = {"optimizer.learning_rate": (32 * 100) ** -0.5, "schedule.warmup": 100.0, "train.steps": STEPS}
    given = override(original, smaller | rhythm)

    rows = np.random.default_rng(0).integers(0, V, (STEPS + 1, ROWS, LENGTH // 2))
    rows = np.concatenate([rows, rows, rows[..., :1]], -1).astype(np.int32)  # the second half is the first
    batches = Batch(rows[:, :, :-1], rows[:, :, 1:])
    one = trial(given, nameless(V))
    state = jax.jit(one.init)({})
    evaluate = jax.jit(lambda state: one.evaluate({}, state, jax.tree.map(lambda x: x[-1:], batches))["loss"].mean)
    before = float(evaluate(state))
    state, _ = jax.jit(one.steps)({}, state, jax.tree.map(lambda x: x[:-1], batches))
    after = float(evaluate(state))
    assert before > np.log(V) and after < 0.6 * np.log(V), (before, after)
