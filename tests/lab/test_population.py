"""A population equals the same trials trained one by one, for every optimizer, schedule value and device layout."""
from dataclasses import replace

import jax
import numpy as np
import pytest

from llm_jax.core import platform
from llm_jax.core.config import override
from llm_jax.core.types import Batch
from llm_jax.data.pipeline import Data
from llm_jax.lab import population
from llm_jax.lab.experiment import Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.optim import optimizers
from llm_jax.train.pretrain import Train

VOCABULARY, STEPS, ROWS, LENGTH = 17, 20, 4, 8
OPTIMIZERS = [optimizers.SGD, optimizers.Momentum, optimizers.Adam, optimizers.AdamW, optimizers.Adafactor, optimizers.Lion, optimizers.Muon,
              optimizers.SOAP, optimizers.Sophia, optimizers.ScheduleFreeAdamW]


def tiny(**changes) -> Experiment:
    base = Experiment(
        data=Data(sequence_length=LENGTH, batch_size=ROWS), model=Decoder(width=16, depth=2, attention=Attention(heads=2)),
        train=Train(steps=STEPS), evaluation=Evaluation(every=STEPS))
    return override(base, changes)


def batches(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (STEPS, ROWS, LENGTH + 1)).astype(np.int32)
    return Batch(ids[..., :-1], ids[..., 1:])


def train(experiments, devices=None):
    compiled = population.compile_population(experiments[0], len(experiments), vocabulary=VOCABULARY,
                                             byte_lengths=np.ones(VOCABULARY, np.int32), devices=devices)
    program = compiled.bind(experiments)
    feed = jax.tree.map(lambda *rows: np.stack(rows), *[batches(e.seed) for e in experiments])
    state, metrics = program.steps(program.init(), feed)
    evaluated = program.evaluate(state, batches(99))
    return jax.device_get((state.params, metrics["train/loss"].mean, evaluated["loss"].mean))


def assert_same(together, alone, tolerance=1e-5):
    for index, one in enumerate(alone):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[index], b[0], rtol=tolerance, atol=tolerance), together, one)  # noqa: B023


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.__name__)
def test_population_equals_one_by_one(optimizer):
    rate = optimizer().learning_rate
    experiments = [tiny(**{"optimizer": optimizer(), "optimizer.learning_rate": rate * f, "seed": s}) for s, f in enumerate((1.0, 0.3, 0.1))]
    one = jax.devices()[:1]
    assert_same(train(experiments, jax.devices()[:2]), [train([e], one) for e in experiments])


@pytest.mark.parametrize("path, values", [("model.dropout.residual", (0.1, 0.4)), ("optimizer.weight_decay", (0.05, 0.5)), ("train.clip", (0.1, 1.0)),
                                          ("objective.z_loss", (1e-4, 1e-2))])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_every_traced_field_may_differ_within_a_program(path, values, layers):
    experiments = [tiny(**{path: v, "model.layers": layers}) for v in values]
    assert population.structure(experiments[0]) == population.structure(experiments[1])
    together = train(experiments, jax.devices()[:2])
    assert_same(together, [train([e], jax.devices()[:1]) for e in experiments])
    assert not np.allclose(together[1][0], together[1][1], rtol=1e-6), "the two values should train differently"


@pytest.mark.parametrize("in_turn", [True, False])
def test_trials_in_turn_equal_trials_in_a_batch(monkeypatch, in_turn):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, population_in_turn=in_turn))
    experiments = [tiny(seed=s) for s in range(3)]
    assert_same(train(experiments, jax.devices()[:1]), [train([e], jax.devices()[:1]) for e in experiments])


def test_groups_split_by_structure_and_size():
    experiments = [tiny(seed=s, **{"optimizer.weight_decay": d}) for d in (0.0, 0.1) for s in range(3)]
    assert population.groups(experiments) == [[0, 1, 2], [3, 4, 5]], "a rate of zero is compiled away, so it is another program"
    assert population.groups(experiments, largest=2) == [[0, 1], [2], [3, 4], [5]]
