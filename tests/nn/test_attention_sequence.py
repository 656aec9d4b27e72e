"""Attention of rows that are split along their length, against the same on one device: outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import sharding
from llm_jax.core.mesh import Mesh
from llm_jax.nn.attention import Bias, Bidirectional, Causal, Chunked, Places, Prefix, SlidingWindow, attend
from llm_jax.nn.kernels import sequence
from llm_jax.train.ahead import collectives, hlo

B, L, H, G, K = 2, 32, 4, 2, 8
MASKS = {
    "causal": Causal(),
    "bidirectional": Bidirectional(),
    "window": SlidingWindow(window=5, sinks=2),
    "chunks": Chunked(size=12),
    "prefix": Prefix(),
}


def slopes(params, queries_BL, keys_BM):
    distance_BLM = jnp.abs(queries_BL[:, :, None] - keys_BM[:, None]).astype(jnp.float32)
    return -params[None, :, None, None] * distance_BLM[:, None]


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, L, heads, K)).astype(np.float32) for heads in (H, G, G))
    return q, k, v, rng.normal(size=H).astype(np.float32), np.float32(rng.uniform(size=H))


def documents():
    segments = np.repeat(np.array([[0, 1, 2, 2], [0, 0, 1, -1]], np.int32), L // 4, 1)
    prefix = np.tile(np.arange(L) % (L // 4) < 3, (B, 1))
    position = np.stack(
        [np.concatenate([np.arange(n) for n in np.diff(np.r_[0, np.nonzero(np.diff(s))[0] + 1, L])]) for s in segments]
    )
    return Places(segment=segments, prefix=prefix, position=position.astype(np.int32))


def value(q, k, v, sinks, slope, places, mask, backend, weights):
    given = {"mask": mask, "queries": places, "keys": places, "sinks_H": sinks, "bias": Bias(slopes, slope), "backend": backend}
    out = attend(q, k, v, **given)
    return (out * weights).sum(), out


ALONG, AMONG = {"sequence": 4}, {"data": 2, "sequence": 2, "tensor": 2}  # the axis alone, and with others


@pytest.mark.parametrize(
    "context, backend, meshes",
    [("ring", "auto", [ALONG, AMONG]), ("gather", "dense", [AMONG]), ("gather", "blockwise", [ALONG])],
    ids=["ring", "gather-dense", "gather-blockwise"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_row_on_several_devices_is_the_row_on_one(mask, packed, context, backend, meshes):
    arrays, places = arguments(), documents() if packed else Places()
    weights = np.random.default_rng(1).normal(size=(B, L, H, K)).astype(np.float32)

    def differentiated(*given):
        return jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4), has_aux=True)(*given, places, mask, backend, weights)

    (_, expected), slopes = jax.jit(differentiated)(*arrays)
    for axes in meshes:
        mesh = Mesh(**{"data": 1} | axes, context=context)
        devices = mesh.build(jax.devices())
        with sharding.on(devices, mesh):
            (_, out), grads = jax.jit(lambda *given: differentiated(*given))(*arrays)
        np.testing.assert_allclose(out, expected, atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), grads, slopes)


def test_where_shard_maps_must_be_in_the_meshs_order_it_is_so_too(monkeypatch):
    monkeypatch.setattr(sharding, "ORDERED", True)  # as with jaxlib 0.11
    test_a_row_on_several_devices_is_the_row_on_one(MASKS["causal"], True, "gather", "dense", [AMONG])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_device_of_a_causal_row_has_as_much_to_do(size):
    owners = sequence.Line(("sequence",), size, dealt=True).owners(8 * size)
    work = (owners + 1).sum(1)
    assert len(set(work)) == 1 and sorted(owners.reshape(-1)) == list(range(8 * size))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_what_is_dealt_out_comes_back(size):
    line = sequence.Line(("x",), size, dealt=True)
    x = np.arange(2 * 4 * size, dtype=np.float32).reshape(1, -1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:size]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P(None, "x")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=split, out_specs=(split, split))
    def there_and_back(x):
        dealt = line.deal(x)
        return dealt, line.collect(dealt)

    dealt, back = there_and_back(x)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(dealt[0], x[0][line.owners(x.shape[1]).reshape(-1)])


@pytest.mark.parametrize(
    "context",
    [
        pytest.param("gather", marks=pytest.mark.xfail(sharding.ORDERED, reason="are gathered with jaxlib 0.11")),
        "ring",
    ],
)
def test_keys_come_only_from_devices_of_the_same_rows_and_heads(context):
    mesh = Mesh(data=2, sequence=2, tensor=2, context=context)
    devices = mesh.build()
    where = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data", "sequence", "tensor"))
    given = [jax.device_put(x, where) for x in arguments()[:3]]
    with sharding.on(devices, mesh):
        grad = jax.grad(lambda *arrays: attend(*arrays).sum(), argnums=(0, 1, 2))
        text = jax.jit(lambda *arrays: grad(*arrays), out_shardings=(where,) * 3).lower(*given).compile().as_text()
    assert {one.axes for one in collectives.of_module(hlo.parse(text), dict(devices.shape))} == {("sequence",)}


def test_a_ring_passes_pieces_on_and_gathers_nothing():
    arrays = arguments()

    def text(context):
        mesh = Mesh(data=1, sequence=8, context=context)
        with sharding.on(mesh.build(), mesh):
            where = jax.sharding.PartitionSpec(None, "sequence")
            given = [jax.device_put(x, jax.sharding.NamedSharding(mesh.build(), where)) for x in arrays[:3]]
            return jax.jit(lambda q, k, v: attend(q, k, v)).lower(*given).compile().as_text()

    assert "all-gather" not in text("ring") and "collective-permute" in text("ring")
    assert "all-gather" in text("gather")
