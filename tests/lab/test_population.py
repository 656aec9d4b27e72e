"""A population equals the same trials trained one by one, for every optimizer, schedule value and device layout."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llm_jax.core import platform
from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.core.types import Batch
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import nameless
from llm_jax.lab import population
from llm_jax.lab.experiment import Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.losses import Focal
from llm_jax.nn.multihead import Attention
from llm_jax.objectives.next_token import NextToken
from llm_jax.optim import optimizers
from llm_jax.train.guard import SkipBad
from llm_jax.train.pretrain import Train

VOCABULARY, STEPS, ROWS, LENGTH = 17, 20, 4, 8
OPTIMIZERS = [
    optimizers.SGD,
    optimizers.Momentum,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.Adafactor,
    optimizers.Lion,
    optimizers.Muon,
    optimizers.SOAP,
    optimizers.Sophia,
    optimizers.ScheduleFreeAdamW,
]


def tiny(**changes) -> Experiment:
    base = Experiment(
        data=Data(sequence_length=LENGTH, batch_size=ROWS),
        model=Decoder(width=16, depth=1, attention=Attention(heads=2)),
        train=Train(steps=STEPS),
        evaluation=Evaluation(every=STEPS),
    )
    return override(base, changes)


def batches(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (STEPS, ROWS, LENGTH + 1)).astype(np.int32)
    return Batch(ids[..., :-1], ids[..., 1:])


def compiled(experiment, members, devices):
    return population.compile_population(experiment, members, nameless(VOCABULARY), devices=devices)


def together(experiments, devices=2):
    return train(compiled(experiments[0], len(experiments), jax.devices()[:devices]), experiments)


def alone(experiments):
    """Each by itself, with one program for all."""
    one = compiled(experiments[0], 1, jax.devices()[:1])
    return [train(one, [e]) for e in experiments]


def train(compiled, experiments):
    program = compiled.bind(experiments)
    feed = jax.tree.map(lambda *rows: np.stack(rows), *[batches(e.seed) for e in experiments])
    state, metrics = program.steps(program.init(), feed)
    evaluated = program.evaluate(state, batches(99))
    return jax.device_get((state.params, metrics["train/loss"].mean, evaluated["loss"].mean))


def assert_same(population, singles, tolerance=1e-5):
    for index, one in enumerate(singles):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[index], b[0], rtol=tolerance, atol=tolerance), population, one)


QUICK = (optimizers.AdamW, optimizers.Muon)  # the others take a quarter of a minute each


@pytest.mark.parametrize(
    "optimizer", [pytest.param(o, id=o.__name__, marks=[] if o in QUICK else pytest.mark.slow) for o in OPTIMIZERS]
)
def test_population_equals_one_by_one(optimizer):
    # a side longer than the gradient's rank has no unique eigenbasis: SOAP turns the others, which are of the model's width
    given = optimizer(largest=16) if optimizer is optimizers.SOAP else optimizer()
    rates = [given.learning_rate * f for f in (1.0, 0.3, 0.1)]
    experiments = [tiny(**{"optimizer": given, "optimizer.learning_rate": rate, "seed": s}) for s, rate in enumerate(rates)]
    # rounding may turn the sign of a sum near zero, and so a step of Lion's
    assert_same(together(experiments), alone(experiments), 3e-4 if optimizer is optimizers.Lion else 1e-5)


@pytest.mark.parametrize(
    "path, values",
    [
        pytest.param("model.dropout.residual", (0.1, 0.4), marks=pytest.mark.slow),
        ("optimizer.weight_decay", (0.05, 0.5)),
        ("train.clip", (0.1, 100.0)),
        pytest.param("objective.z_loss", (1e-4, 1e-2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layers", ["scanned"])
def test_every_traced_field_may_differ_within_a_program(path, values, layers):
    experiments = [tiny(**{path: v, "model.layers": layers, "optimizer.learning_rate": 1e-4}) for v in values]
    assert population.structure(experiments[0]) == population.structure(experiments[1])
    both = together(experiments)
    assert_same(both, alone(experiments))
    kernel = both[0]["embedding"]["embedding"]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-6, "the two values should train differently"


@pytest.mark.parametrize("in_turn", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_trials_in_turn_equal_trials_in_a_batch(monkeypatch, in_turn):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, population_in_turn=in_turn))
    experiments = [tiny(seed=s) for s in range(3)]
    assert_same(together(experiments, devices=1), alone(experiments))


@pytest.mark.slow
@pytest.mark.parametrize("in_turn", [True, False])
def test_trials_on_a_mesh_lose_by_blocks_what_each_loses_at_once(monkeypatch, in_turn):
    """Blocks of tokens inside the population's `shard_map`, with rows split over two axes, and a traced field of the criterion."""
    traits = {"flat_gradient_sums": False, "population_in_turn": in_turn, "logits_at_once": 3 * VOCABULARY, "tokens_at_once": 2}
    objectives = [NextToken(criterion=Focal(gamma=gamma), z_loss=0.01) for gamma in (0.5, 1.0, 2.0, 3.0)]
    single = [tiny(objective=objective) for objective in objectives]
    expected = alone(single)
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, **traits))
    split = [override(experiment, {"mesh": Mesh(population=2, data=2, fsdp=2)}) for experiment in single]
    assert len(population.groups(split)) == 1
    assert_same(together(split, devices=8), expected, 1e-4)


def test_each_trial_of_a_population_leaves_out_its_own_updates():
    guard = SkipBad(deviations=1.0, decay=0.8, after=4)
    experiments = [
        tiny(**{"train.guard": guard, "seed": s, "optimizer.learning_rate": rate}) for s, rate in enumerate((1e-3, 3e-3))
    ]
    program = compiled(experiments[0], 2, jax.devices()[:1]).bind(experiments)
    feed = jax.tree.map(lambda *rows: np.stack(rows), *[batches(e.seed) for e in experiments])
    state, metrics = program.steps(program.init(), feed)
    skipped = np.asarray(state.guard.skipped)
    assert skipped[0] != skipped[1] and skipped.max() > 0, skipped
    np.testing.assert_allclose(metrics["train/skipped"].total, skipped)
    assert_same(together(experiments), alone(experiments))


def test_groups_split_by_structure_and_size():
    experiments = [tiny(seed=s, **{"optimizer.weight_decay": d}) for d in (0.0, 0.1) for s in range(3)]
    assert population.groups(experiments) == [[0, 1, 2], [3, 4, 5]], "a rate of zero is compiled away, so it is another program"
    assert population.groups(experiments, largest=lambda e: 2) == [[0, 1], [2], [3, 4], [5]]


def test_what_is_expected_is_what_is_called():
    program, experiments = compiled(tiny(), 3, jax.devices()[:2]), [tiny(seed=s) for s in range(3)]
    one = jax.tree.map(lambda x: x[None], batches(0))
    program.expect(one, [batches(99)], fresh=True)
    trained = train(program, experiments)
    for part in (program.init, program.steps, program.evaluate):
        part._function = None  # nothing is compiled from here on
    jax.tree.map(np.testing.assert_array_equal, train(program, experiments), trained)
