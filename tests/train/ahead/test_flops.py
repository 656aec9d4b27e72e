"""Each against the number that a person would write down."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from llm_jax.data.tokenizers import nameless
from llm_jax.lab.experiment import Experiment
from llm_jax.models import count
from llm_jax.models.decoder import Decoder
from llm_jax.train.ahead.flops import of_jaxpr
from llm_jax.train.pretrain import trial

N = 8
PRODUCT = 2 * N**3
X = jax.ShapeDtypeStruct((N, N), jnp.float32)


def flops(function, *args):
    return of_jaxpr(jax.make_jaxpr(function)(*args))


def scanned(x):
    return jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]


def twice(x):
    return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 2, c[1] @ c[1]), (1, x))[1]


def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)


@jax.custom_vjp
def own(x):
    return x @ x


own.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

CASES = {
    "product": (lambda x: x @ x, 1),
    "batched": (lambda x: jnp.einsum("bij,bjk->bik", *[jnp.broadcast_to(x, (3, N, N))] * 2), 3),
    "scan": (scanned, 5),
    "gradient of a scan": (jax.grad(lambda x: scanned(x).sum()), 15),
    "scan in a scan": (lambda x: jax.lax.scan(lambda y, _: (scanned(y), None), x, length=2)[0], 10),
    "while": (twice, 3),
    "for": (lambda x: jax.lax.fori_loop(2, 6, lambda _, y: y @ y, x), 4),
    "branches": (branches, 2),
    "jit": (lambda x: jax.jit(lambda y: y @ y)(x), 1),
    "custom rule": (own, 1),
    "its gradient": (jax.grad(lambda x: own(x).sum()), 3),
    "remat": (jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(y @ y) @ y)(x).sum()), 7),
    "vmap": (lambda x: jax.vmap(lambda y: y @ x)(jnp.broadcast_to(x, (4, N, N))), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_counted_as_often_as_they_are_done(name):
    function, products = CASES[name]
    found = flops(function, X)
    assert found.products == products * PRODUCT
    assert (found.kernels, found.uncounted) == (0, 0)


def test_a_loop_of_unknown_length_says_so():
    found = flops(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y @ y, x), X, 3)
    assert (found.products, found.uncounted) == (PRODUCT, 1)


def test_a_convolution():
    x, kernel = jnp.ones((2, 10, 3)), jnp.ones((4, 3, 5))
    found = flops(lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")), x, kernel)
    assert found.products == 2 * (2 * 10 * 5) * (4 * 3)


def test_ragged_products_meet_one_matrix_a_row_forward_and_back():
    rows, matrices, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 3)), jnp.array([5, 3])
    product = lambda a, b: jax.lax.ragged_dot(a, b, sizes)  # noqa: E731
    assert flops(product, rows, matrices).grouped == 2 * 8 * 4 * 3
    assert flops(jax.grad(lambda a, b: product(a, b).sum(), argnums=(0, 1)), rows, matrices).grouped == 3 * 2 * 8 * 4 * 3


def test_a_shard_map_counts_its_body_on_every_device_that_splits_it():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    given = {"mesh": mesh, "in_specs": PartitionSpec("a"), "out_specs": PartitionSpec("a"), "axis_names": {"a"}}
    with jax.set_mesh(mesh):
        found = flops(jax.shard_map(lambda x: x @ jnp.ones((N, N)), **given), X)
    assert found.products == PRODUCT


def _kernel(x_ref, y_ref, o_ref):
    o_ref[...] = x_ref[...] @ y_ref[...]


@pytest.mark.parametrize("estimate", [None, pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)])
def test_a_kernel_counts_once_for_each_point_of_its_grid_or_what_it_says(estimate):
    half = pl.BlockSpec((N // 2, N), lambda i: (i, 0))
    call = pl.pallas_call(
        _kernel,
        grid=(2,),
        in_specs=[half, pl.BlockSpec((N, N), lambda i: (0, 0))],
        out_specs=half,
        out_shape=X,
        cost_estimate=estimate,
        interpret=True,
    )
    found = flops(call, X, X)
    assert (found.products, found.kernels) == (0, 123 if estimate else PRODUCT)


@pytest.mark.parametrize("remat, layers", [("none", "unrolled"), ("none", "scanned"), ("full", "scanned")])
def test_a_training_step_is_what_the_formula_says_and_remat_a_third_more(remat, layers):
    experiment = Experiment(model=Decoder(width=64, depth=3, remat=remat, layers=layers))
    tokens, length = nameless(128), 32
    one = trial(experiment, tokens)
    state = jax.eval_shape(one.init, {})
    batch = jax.ShapeDtypeStruct((1, 2, length), jnp.int32)
    from llm_jax.core.types import Batch

    found = flops(lambda state, batch: one.steps({}, state, batch), state, Batch(batch, batch))
    model = 2 * count.flops_per_row(experiment.model, 128, length)
    head = 2 * 6 * length * 64 * 128
    if remat == "none":
        assert found.total == pytest.approx(model, rel=0.02)
    else:  # all but what no gradient asks for again: the last product of a layer
        down = 2 * 2 * length * 3 * 64 * 256
        assert found.total == pytest.approx(head + (model - head) * 4 / 3 - down, rel=0.02)
