"""Eight devices, data=2 × fsdp=2 × tensor=2: the numbers of one device, and arrays that are really split."""

import jax
import numpy as np
import pytest

from llm_jax.core import sharding
from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import nameless
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.lab import population
from llm_jax.nn.multihead import Attention
from llm_jax.optim.optimizers import Muon
from tests.lab.test_population import LENGTH, ROWS, VOCABULARY, alone, assert_same, compiled, tiny, train

STEPS = 20


def losses(mesh: Mesh, devices, *, extra: int = 3, **changes):
    """The losses of 20 steps, one by one, and the final state."""
    experiment = tiny(mesh=mesh, **{"model.width": 32, "train.steps": STEPS, **changes})
    compiled = population.compile_population(experiment, 1, nameless(VOCABULARY + extra), devices=devices)
    program = compiled.bind([experiment])
    state, seen = program.init(), []
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, 4, (1, 1, ROWS, LENGTH + 1)).astype(np.int32)  # few of the ids, which can be learned
        state, metrics = program.steps(state, Batch(ids[..., :-1], ids[..., 1:]))
        seen.append(float(metrics["train/loss"].mean[0]))
    return np.array(seen), state, compiled


@pytest.mark.parametrize("layers", [pytest.param("unrolled", marks=pytest.mark.slow), "scanned"])
def test_a_mesh_of_eight_equals_one_device(layers):
    changes = {"model.layers": layers, "train.average": 0.9}
    one, _, _ = losses(Mesh(), jax.devices()[:1], **changes)
    eight, state, _ = losses(Mesh(data=2, fsdp=2, tensor=2), jax.devices()[:8], **changes)
    np.testing.assert_allclose(eight, one, atol=1e-5)
    assert one[-1] < one[0], "nothing was learned, so equality would show nothing"
    split = [leaf for leaf in jax.tree.leaves(state.params) if leaf.addressable_shards[0].data.size < leaf.size]
    assert len(split) >= 4, "the weights should be split over fsdp and tensor"
    for tree, what in ((state.params, "parameters"), (state.opt_state, "optimizer state"), (state.average, "average")):
        queries = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "query" in jax.tree_util.keystr(path)]
        assert queries and all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in queries), (
            f"{what} should be split over fsdp and tensor"
        )


@pytest.mark.parametrize("axis", ["fsdp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("data", "tensor"))])
def test_a_population_is_split_beside_every_other_axis(axis):
    split, whole = {f"mesh.{axis}": 2, "mesh.population": 2}, {f"mesh.{axis}": 1, "mesh.population": 1}
    own = [{"seed": s, "optimizer.learning_rate": 1e-3 * (1 + s), "objective.smoothing": 0.1 * (1 + s)} for s in range(2)]
    experiments = [tiny(**split, **{"model.width": 32}, **values) for values in own]
    together = train(compiled(experiments[0], 2, jax.devices()[:4]), experiments)
    singles = alone([override(e, whole) for e in experiments])
    assert_same(together[1:], [one[1:] for one in singles])
    assert_same(together[0], [one[0] for one in singles], tolerance=1e-3)  # Adam divides what is nearly zero by itself


@pytest.mark.slow
def test_data_parallel_devices_share_the_work_of_muon():
    change = {"optimizer": Muon(learning_rate=0.02)}
    one, _, _ = losses(Mesh(), jax.devices()[:1], **change)
    two, state, _ = losses(Mesh(data=2), jax.devices()[:2], **change)
    np.testing.assert_allclose(two, one, atol=1e-5)
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_array_equal(*(shard.data for shard in leaf.addressable_shards))


def test_what_a_step_alone_needs_lies_with_the_host_between_steps(tmp_path):
    changes = {"train.average": 0.9, "train.steps": STEPS}
    here, _, _ = losses(Mesh(fsdp=2), jax.devices()[:4], **changes)
    there, state, compiled = losses(Mesh(fsdp=2, offload=True), jax.devices()[:4], **changes)
    np.testing.assert_array_equal(there, here)
    for part in (state.opt_state, state.average):
        large = [leaf for leaf in jax.tree.leaves(part) if leaf.size > sharding.SMALL]
        assert large and {leaf.sharding.memory_kind for leaf in large} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    checkpointer = Checkpointer(tmp_path, asynchronous=False)
    checkpointer.save(1, state, {}, {})
    _, restored, _ = checkpointer.restore(compiled.abstract)
    checkpointer.close()
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)


def test_activations_are_really_split():
    experiment = tiny(mesh=Mesh(data=2, fsdp=2, tensor=2), **{"model.width": 32})
    compiled = population.compile_population(experiment, 1, nameless(VOCABULARY + 3))
    params = jax.tree.map(lambda x: x[0], compiled.bind([experiment]).init().params)
    network = experiment.model.build(VOCABULARY + 3)
    with jax.set_mesh(compiled.mesh):
        logits_BLV = jax.jit(network.apply)({"params": params}, np.zeros((ROWS, LENGTH), np.int32))
    assert logits_BLV.addressable_shards[0].data.shape == (ROWS // 4, LENGTH, (VOCABULARY + 3) // 2), logits_BLV.sharding


def test_activations_are_constrained_in_the_lowered_program():
    _, _, compiled = losses(Mesh(data=2, fsdp=2, tensor=2), jax.devices()[:8], **{"train.steps": STEPS})
    ids = np.zeros((1, 1, ROWS, LENGTH), np.int32)
    with jax.set_mesh(compiled.mesh):
        text = compiled.steps.lower(population.stacked_values([tiny()], 1), compiled.abstract, Batch(ids, ids)).as_text()
    assert "sharding_constraint" in text


def test_what_an_axis_does_not_divide_stays_whole():
    mqa = {"model.attention": Attention(heads=2, kv_heads=1)}
    one, eight = (
        losses(mesh, devices, extra=2, **mqa)[:2] for mesh, devices in ((Mesh(), jax.devices()[:1]), (Mesh(data=4, tensor=2), None))
    )
    np.testing.assert_allclose(eight[0], one[0], atol=1e-5)
    table = eight[1].params["embedding"]["embedding"]
    assert table.shape[1] % 2 and table.addressable_shards[0].data.size == table.size
