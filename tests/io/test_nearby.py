"""Copies on a machine's own disk: what was saved, laid out as it was, or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.mesh import Mesh
from llm_jax.io.nearby import ARRAYS, KEPT, Nearby


def state(mesh, seed=0):
    rng = np.random.default_rng(seed)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    return {
        "split": put(rng.normal(size=(8, 4)).astype(np.float32), "fsdp", "tensor"),
        "whole": put(rng.normal(size=3).astype(np.float32)),
        "narrow": put(jnp.asarray(rng.normal(size=(4, 2)), jnp.bfloat16), "tensor"),
        "step": put(np.int32(seed)),
        "key": jax.device_put(jax.random.key(seed), jax.NamedSharding(mesh, jax.P())),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def plain(tree):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(data(x)), tree)


@pytest.fixture
def mesh():
    return Mesh(data=2, fsdp=2, tensor=2).build()


@pytest.fixture
def copies(tmp_path):
    told = []
    nearby = Nearby(tmp_path, every=10, warn=told.append)
    nearby.told = told
    return nearby


def test_what_was_saved_comes_back_as_it_lay(mesh, copies):
    for step in (10, 20, 30):
        copies.save(step, state(mesh, step), {"seconds": step / 2})
    copies.wait()
    assert copies.steps() == [20, 30] and len(copies.steps()) == KEPT
    step, found, extra = copies.restore(abstract(state(mesh)), after=10)
    assert (step, extra) == (30, {"seconds": 15.0})
    jax.tree.map(np.testing.assert_array_equal, plain(found), plain(state(mesh, 30)))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, state(mesh))
    assert copies.restore(abstract(state(mesh)), after=30) is None, "a checkpoint of the same step serves as well"
    assert copies.restore(abstract(state(mesh)), after=0, fits=lambda step, extra: extra["seconds"] < 15)[0] == 20
    copies.clear()
    assert copies.restore(abstract(state(mesh)), after=0) is None and not copies.told


def test_a_damaged_copy_is_passed_over(mesh, copies):
    for step in (10, 20):
        copies.save(step, state(mesh, step), {})
    copies.wait()
    file = copies.folder / "20" / ARRAYS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert copies.restore(abstract(state(mesh)), after=0)[0] == 10


def test_a_copy_that_lies_otherwise_is_of_no_use(mesh, copies):
    copies.save(10, state(mesh), {})
    copies.wait()
    assert copies.restore(abstract(state(Mesh(data=1, fsdp=8).build())), after=0) is None


def test_a_disk_that_takes_nothing_does_not_end_training(mesh, tmp_path):
    told = []
    (tmp_path / "file").write_text("")
    copies = Nearby(tmp_path / "file", every=10, warn=told.append)
    copies.save(10, state(mesh), {})
    copies.wait()
    assert "no copy could be kept" in told[0] and copies.restore(abstract(state(mesh)), after=0) is None
