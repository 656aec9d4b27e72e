"""What holds for every optimizer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from llm_jax.core import sharding
from llm_jax.core.config import ConfigError, components, from_json, to_json
from llm_jax.models.model import matrix_axes, parameter_roles, stack_layers, unstack_layers
from llm_jax.optim.optimizers import (
    SGD,
    SOAP,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    Momentum,
    Muon,
    Optimizer,
    ScheduleFreeAdamW,
    Sophia,
)
from tests.optim import problems

# with learning rates for these problems; what happens every few steps happens often enough to be seen
OPTIMIZERS = [
    SGD(learning_rate=0.3),
    Momentum(learning_rate=0.02),
    Momentum(learning_rate=0.05, nesterov=True),
    Adam(learning_rate=0.05),
    AdamW(learning_rate=0.05, weight_decay=0.01),
    Adafactor(learning_rate=0.05, weight_decay=0.01, smallest=8),
    Lion(learning_rate=0.02, weight_decay=0.01),
    Muon(learning_rate=0.1, weight_decay=0.01),
    SOAP(learning_rate=0.05, weight_decay=0.01, frequency=3),
    Sophia(learning_rate=0.03, weight_decay=0.01, interval=3),
    ScheduleFreeAdamW(learning_rate=0.1, weight_decay=0.01),
]
every_optimizer = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__ + ("-nesterov" if o == OPTIMIZERS[2] else "")
)


def tolerance(optimizer):
    """Of float32 over some steps whose sums are made in other orders, which turn the eigenvectors of nearly equal eigenvalues."""
    return 5e-4 if isinstance(optimizer, SOAP) else 2e-5


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_the_table_is_complete():
    assert {type(o) for o in OPTIMIZERS} == set(components(Optimizer).values())


@every_optimizer
@pytest.mark.parametrize("loss", [problems.quadratic, problems.network], ids=lambda f: f.__name__)
def test_the_loss_falls(optimizer, loss):
    start = problems.tree()
    params, state = jax.jit(lambda p: problems.descend(optimizer, loss, p, 80))(start)
    after = float(loss(optimizer.evaluation_params(state, params)))
    assert after < 0.5 * float(loss(start)), f"{after} from {float(loss(start))}"


@every_optimizer
def test_a_population_equals_its_members(optimizer):
    train = jax.jit(lambda values: problems.descend(optimizer, problems.quadratic, problems.tree(), 10, values))
    values = problems.varied(optimizer)
    together = jax.jit(jax.vmap(train))(values)
    for member in range(2):
        alone = train({path: value[member] for path, value in values.items()})
        close(jax.tree.map(lambda x: x[member], together[0]), alone[0], tolerance(optimizer))
    assert not np.allclose(*jax.tree.leaves(together[0])[0], rtol=1e-3), "the two members should train differently"


@every_optimizer
def test_traced_values_equal_static_ones(optimizer):
    values = {path: value[1] for path, value in problems.varied(optimizer).items()}
    traced = jax.jit(lambda v: problems.descend(optimizer, problems.quadratic, problems.tree(), 6, v))(values)
    static = problems.descend(
        replace(optimizer, **{path: float(value) for path, value in values.items()}), problems.quadratic, problems.tree(), 6
    )
    close(traced[0], static[0], tolerance(optimizer))


@every_optimizer
def test_the_state_is_arrays_whose_structure_does_not_depend_on_values(optimizer):
    params = problems.tree()
    states = [problems.built(replace(optimizer, learning_rate=rate), params).init(params) for rate in (0.1, 0.2)]
    states.append(
        jax.jit(lambda v: problems.descend(optimizer, problems.quadratic, params, 1, v)[1])(
            {path: value[0] for path, value in problems.varied(optimizer).items()}
        )
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(states[0]))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2]


# moments shaped like the parameter: (of matrices, of everything else)
MOMENTS = {
    SGD: (0, 0),
    Momentum: (1, 1),
    Adam: (2, 2),
    AdamW: (2, 2),
    Adafactor: (0, 0),
    Lion: (1, 1),
    Muon: (1, 2),
    SOAP: (2, 2),
    Sophia: (2, 2),
    ScheduleFreeAdamW: (2, 2),
}


@every_optimizer
def test_moments_are_split_like_their_parameters(optimizer):
    params = problems.tree(hidden=12)
    paths = jax.tree_util.tree_map_with_path(lambda path, leaf: PartitionSpec(jax.tree_util.keystr(path)), params)
    state = problems.built(optimizer, params).init(params)
    specs = jax.tree.leaves(sharding.state_specs(params, paths, state), is_leaf=lambda s: isinstance(s, PartitionSpec))
    leaves = jax.tree.leaves(state)
    for path, role in zip(
        jax.tree.leaves(paths, is_leaf=lambda s: isinstance(s, PartitionSpec)),
        jax.tree.leaves(parameter_roles(params)),
        strict=True,
    ):
        assert specs.count(path) == MOMENTS[type(optimizer)][role != "matrix"], path
    replicated = sum(leaf.size for leaf, spec in zip(leaves, specs, strict=True) if spec == PartitionSpec())
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    bases = sum(2 * (a * a + b * b) for a, b in [(8, 8), (8, 8), (8, 12), (12, 8)]) * problems.LAYERS
    assert replicated < (size if isinstance(optimizer, Adafactor) else bases + 20 if isinstance(optimizer, SOAP) else 10)


@every_optimizer
def test_zero_gradients_move_nothing(optimizer):
    params = problems.tree()
    still = replace(optimizer, weight_decay=0.0) if "weight_decay" in to_json(optimizer) else optimizer
    flat = lambda p: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(p))  # noqa: E731
    moved, state = problems.descend(still, flat, params, 7)
    close(moved, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@every_optimizer
def test_scanned_layers_equal_unrolled_ones(optimizer):
    params = problems.tree()
    unrolled, _ = jax.jit(lambda p: problems.descend(optimizer, problems.quadratic, p, 8))(params)
    scanned, _ = jax.jit(lambda p: problems.descend(optimizer, problems.quadratic, p, 8))(stack_layers(params, problems.SCANNED))
    close(unstack_layers(scanned, problems.SCANNED), unrolled, tolerance(optimizer))


@every_optimizer
def test_decay_spares_vectors_only(optimizer):
    if "weight_decay" not in to_json(optimizer):
        pytest.skip("has no weight decay")
    params = problems.tree()
    flat = lambda p: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(p))  # noqa: E731
    moved, _ = problems.descend(replace(optimizer, learning_rate=0.5, weight_decay=0.1), flat, params, 1)
    jax.tree.map(
        lambda new, old, role: np.testing.assert_allclose(new, old * (1.0 if role == "vector" else 0.95), rtol=1e-5),
        moved,
        params,
        parameter_roles(params),
    )


@every_optimizer
def test_the_factor_scales_every_step(optimizer):
    params = problems.tree()
    rule = problems.built(optimizer, params, lambda step: jnp.where(step == 0, 0.0, 1.0))
    grads = jax.grad(problems.quadratic)(params)
    update = jax.jit(lambda state, key: rule.update(grads, state, params, value=0.0, loss_fn=problems.quadratic, key=key))
    updates, state = update(rule.init(params), jax.random.key(0))
    close(optax.apply_updates(params, updates), params)
    updates, state = update(state, jax.random.key(1))
    assert optax.tree.norm(updates) > 1e-3


@every_optimizer
def test_configurations_survive_json(optimizer):
    assert from_json(to_json(optimizer), Optimizer) == optimizer


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: AdamW(learning_rate=-1.0), "learning_rate must be > 0, got -1.0"),
        (lambda: SGD(learning_rate=0.0), "learning_rate must be > 0, got 0.0"),
        (lambda: Lion(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
        (lambda: Adam(b1=1.0), "b1 must be in [0, 1), got 1.0"),
        (lambda: Lion(b2=1.5), "b2 must be in [0, 1), got 1.5"),
        (lambda: Muon(momentum=1.0), "momentum must be in [0, 1), got 1.0"),
        (lambda: Muon(iterations=0), "iterations must be > 0, got 0"),
        (lambda: SOAP(frequency=0), "frequency must be > 0, got 0"),
        (lambda: Sophia(interval=0), "interval must be > 0, got 0"),
        (lambda: Adafactor(clip=0.0), "clip must be > 0, got 0.0"),
        (lambda: Adam(epsilon=0.0), "epsilon must be > 0, got 0.0"),
        (lambda: ScheduleFreeAdamW(b1=0.0), "b1 must be in (0, 1), got 0.0"),
        (lambda: AdamW(learning_rate="fast"), "learning_rate must be float, got 'fast'"),
    ],
)
def test_mistakes_are_one_sentence(build, sentence):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == sentence


def test_every_matrix_has_its_axes():
    params = problems.tree(hidden=12)
    axes = matrix_axes(params)["layers_0"]
    assert axes["attention"]["query"]["kernel"] == ((0,), (1, 2)) and axes["attention"]["output"]["kernel"] == ((0, 1), (2,))
    assert matrix_axes(stack_layers(params, problems.SCANNED))["layers"]["step_0"]["attention"]["output"]["kernel"] == (
        (1, 2),
        (3,),
    )
