"""Sums over the data axis: what one device would have summed, whichever arrays share the message."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm_jax.core import platform
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import ALONE, each_by_one, sum_over_data

ROWS = 8
TREES = {
    "small": {"a": (3, 5), "b": {"c": (), "d": (1,)}},
    "large": {"a": (ALONE,), "b": (2, ALONE)},
    "mixed": {"a": (ALONE,), "b": (3,), "c": {"d": (300, 300), "e": ()}, "f": (2, 2)},
    "around the bound": {"a": (ALONE - 1,), "b": (ALONE,), "c": (ALONE + 1,)},
    "with nothing in it": [(0, 3), (4,), {"x": (ALONE,), "y": None}],
    "empty": {},
}
every_tree = pytest.mark.parametrize("shapes", TREES.values(), ids=TREES)


def is_shape(node):
    return isinstance(node, tuple)


def sums(shapes, params, batch):
    """Integers, which float32 adds exactly: each entry has a factor of its own, each row a weight."""
    rows = (params["w"] * batch["x"]).sum(1) * batch["weight"]

    def leaf(shape):
        factors = jnp.arange(int(np.prod(shape)), dtype=jnp.float32).reshape(shape) % 13
        return factors * rows.sum() - jnp.square(rows).sum()

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def operands():
    rng = np.random.default_rng(0)
    params = {"w": rng.integers(-3, 4, (1, 4)).astype(np.float32)}
    return params, {"x": rng.integers(-3, 4, (ROWS, 4)).astype(np.float32), "weight": np.arange(ROWS, dtype=np.float32)}


def mesh(**axes):
    shape = Mesh(**axes)
    return shape.build(jax.devices()[: int(np.prod(list(shape.sizes.values())))])


@every_tree
@pytest.mark.parametrize("devices", [2, 4])
def test_split_rows_have_the_sums_of_whole_ones(shapes, devices):
    function, (params, batch) = partial(sums, shapes), operands()
    expected = function(params, batch)
    with jax.set_mesh(mesh(data=devices)):
        got = jax.jit(lambda *p: sum_over_data(function)(*p))(params, batch)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, whole in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == whole.dtype and len(leaf.addressable_shards) == devices
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole)


def test_gradients_of_a_loss_are_those_of_one_device():
    params = {"up": jax.random.normal(jax.random.key(0), (4, ALONE // 4)), "down": jnp.full((ALONE // 4, 1), 0.01)}
    batch = {"x": jax.random.normal(jax.random.key(1), (ROWS, 4)), "weight": jnp.arange(float(ROWS))}

    def total(params, batch):
        return ((jnp.tanh(batch["x"] @ params["up"]) @ params["down"])[:, 0] ** 2 * batch["weight"]).sum()

    expected = jax.value_and_grad(total)(params, batch)
    with jax.set_mesh(mesh(data=4)):
        got = jax.jit(lambda *p: sum_over_data(jax.value_and_grad(total))(*p))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize(
    "name, messages",
    [("small", 1), ("large", 2), ("mixed", 3), ("around the bound", 3)],
)
def test_small_sums_travel_together(name, messages):
    with jax.set_mesh(mesh(data=2)):
        text = jax.jit(lambda *p: sum_over_data(partial(sums, TREES[name]))(*p)).lower(*operands()).as_text()
    sent = [line for line in text.splitlines() if "all_reduce" in line]
    assert len(sent) - sum("tensor<0x" in line for line in sent) == messages


def test_dtypes_survive_the_common_message():
    def function(params, batch):
        rows = batch["x"].sum(1)
        return {"float": rows.sum(), "half": rows.sum().astype(jnp.bfloat16), "count": jnp.int32(rows.size)}

    with jax.set_mesh(mesh(data=4)):
        got = jax.jit(lambda *p: sum_over_data(function)(*p))({}, {"x": jnp.ones((ROWS, 4))})
    assert {name: (leaf.dtype, float(leaf)) for name, leaf in got.items()} == {
        "float": (jnp.float32, 32.0),
        "half": (jnp.bfloat16, 32.0),
        "count": (jnp.int32, 8.0),
    }


@pytest.mark.parametrize(
    "axes, target",
    [
        ({"data": 1}, "cpu"),
        ({"data": 2, "fsdp": 2}, "cpu"),
        ({"data": 2, "tensor": 2}, "cpu"),
        ({"data": 1, "fsdp": 2}, "cpu"),
        ({"data": 2}, "tpu"),
    ],
    ids=str,
)
def test_elsewhere_the_function_is_left_alone(axes, target):
    with jax.set_mesh(mesh(**axes)), platform.targeting(target):
        assert sum_over_data(sums) is sums


def test_without_a_mesh_the_function_is_left_alone():
    assert sum_over_data(sums) is sums


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_what_one_device_works_on_reaches_the_others(devices):
    xs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 4), (8, 8), (2,), (5, 5, 2), (8, 8)])]
    expected = [jnp.sin(x) * x.size for x in xs]
    with jax.set_mesh(mesh(data=devices)):
        lowered = jax.jit(lambda xs: each_by_one(lambda x: jnp.sin(x) * x.size, xs)).lower(xs)
        got = lowered.compile()(xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    text = lowered.as_text()
    assert text.count("all_reduce") == (devices > 1)
    assert text.count("stablehlo.sine") == len(xs), "every array is worked on in one branch only"


def test_elsewhere_every_device_does_all_the_work():
    xs = [jnp.ones(3), jnp.ones((2, 2))]
    with jax.set_mesh(mesh(data=2, fsdp=2)):
        text = jax.jit(lambda xs: each_by_one(jnp.sin, xs)).lower(xs).as_text()
    assert "all_reduce" not in text


# ── numbers of 16 bits ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 2, "tensor": 2}])
def test_sums_of_bfloat16_where_the_compiler_has_other_axes(axes):
    """XLA:CPU would end the process here, had it not been told to leave sums as they are written (`SUMS_AS_WRITTEN`)."""
    rng = np.random.default_rng(0)
    w, x = rng.integers(-3, 4, (4, 6)).astype(jnp.bfloat16), rng.integers(-3, 4, (ROWS, 4)).astype(jnp.bfloat16)

    def total(w, x):
        rows = PartitionSpec("data")
        local = lambda w, x: x @ w * (jax.lax.axis_index("data") + 1).astype(x.dtype)  # noqa: E731
        specs = {"in_specs": (PartitionSpec(), rows), "out_specs": rows, "axis_names": {"data"}, "check_vma": False}
        return jax.shard_map(local, **specs)(w, x).astype(jnp.float32).sum()

    with jax.set_mesh(mesh(**axes)):
        got = jax.jit(jax.grad(total))(w, x)
    factors = np.repeat([1.0, 2.0], ROWS // 2)
    np.testing.assert_array_equal(got.astype(jnp.float32), np.repeat((factors @ x.astype(np.float32))[:, None], 6, 1))
