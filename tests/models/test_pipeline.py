"""Layers in stages against the same layers on one device: outputs, gradients, what layers with experts count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import sharding
from llm_jax.core.mesh import Mesh
from llm_jax.lab.components import Attention, Decoder, Gated, Layer, MoE, Sigmoid, SlidingWindow
from llm_jax.models.model import abstract_parameters, initial_parameters

V, B, L = 16, 16, 8
RNG = np.random.default_rng(0)
TOKENS, SEGMENTS = RNG.integers(0, V, (B, L)).astype(np.int32), np.sort(RNG.integers(0, 3, (B, L)), 1).astype(np.int32)
HEADS = Attention(heads=4, kv_heads=2)
MODELS = {
    "plain": Decoder(width=16, depth=4, attention=HEADS, layers="scanned", remat="full"),
    "pattern": Decoder(
        width=16,
        depth=9,
        attention=HEADS,
        first=(Layer(ffn=Gated()),),
        pattern=(
            Layer(attention=Attention(heads=4, mask=SlidingWindow(window=3))),
            Layer(ffn=MoE(experts=4, router=Sigmoid(), balance=0.0)),
        ),
        layers="scanned",
    ),
}
MESHES = {
    "two stages": Mesh(data=1, stage=2),
    "more micro-batches": Mesh(data=1, stage=2, microbatches=8),
    "two rounds": Mesh(data=1, stage=2, rounds=2, microbatches=4),
    "with other axes": Mesh(data=1, stage=2, fsdp=2, tensor=2),
    "with experts and rows cut": Mesh(data=1, stage=2, expert=2, sequence=2),
    "four stages": Mesh(data=2, stage=4),
}


QUICK = ("two rounds", "with experts and rows cut")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way in QUICK else pytest.mark.slow) for way in MESHES])
@pytest.mark.parametrize("name", MODELS)
def test_stages_change_no_number(name, way):
    model, mesh = MODELS[name], MESHES[way]
    params = jax.jit(lambda key: initial_parameters(model, V, key))(jax.random.key(0))

    def loss(params):
        logits, sown = model.build(V).apply({"params": params}, TOKENS, None, SEGMENTS, mutable=["routing"])
        counted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(sown)}
        # an auxiliary loss is that of micro-batches, of which it is no sum
        return jnp.square(logits).mean(), (logits, {name: leaf for name, leaf in counted.items() if "balance" not in name})

    differentiate = jax.grad(loss, has_aux=True)
    expected = jax.jit(lambda params: differentiate(params))(params)
    devices = mesh.build(jax.devices())
    specs = sharding.parameter_specs(abstract_parameters(model, V), devices, mesh)
    split = jax.device_put(params, sharding.named(devices, specs))
    with sharding.on(devices, mesh):
        lowered = jax.jit(lambda params: differentiate(params)).lower(split)
        got = lowered.compile()(split)
    assert "collective_permute" in lowered.as_text(), "micro-batches should go from stage to stage"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5), got, expected)


def test_matrices_that_are_the_same_in_every_turn_are_kept_once():
    """What turns leave to their gradients is stacked: `[turns, layers of a stage, …]`."""
    model, mesh = MODELS["plain"], Mesh(data=1, stage=2, microbatches=8)
    params, devices = jax.eval_shape(lambda key: initial_parameters(model, V, key), jax.random.key(0)), mesh.build(jax.devices())

    def loss(params):
        return model.build(V).apply({"params": params}, TOKENS).mean()

    with sharding.on(devices, mesh):
        text = jax.jit(jax.grad(loss)).lower(params).as_text()
    turns, each, width, hidden = 8 + 2 - 1, 2, 16, 64
    assert f"tensor<{turns}x{each}x" in text  # the stream
    assert f"tensor<{turns}x{each}x{width}x{hidden}xf32>" not in text
