"""The search for a mesh: what must come out where the answer is known, and what it must not offer."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llm_jax.core.chips import Topology
from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import Mesh
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab import autoshard, footprint
from llm_jax.lab.arms import Arms
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.lab.population import check_mesh
from llm_jax.models import count
from llm_jax.models.presets.modern import llama3, llama3_2, mixtral
from llm_jax.nn.ffn import Gated
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE

IDS = 128_256
HOST = Topology.parse("v5e:2x4")
POD = Topology.parse("v5e:16x16")


def training(model, *, rows=8, length=2048):
    whole = replace(model, remat="full", layers="scanned", precision=Precision("bfloat16"))
    return Experiment(model=whole, tokenizer=SentencePiece(vocabulary=IDS), data=Data(sequence_length=length, batch_size=rows))


def test_one_device_has_one_mesh():
    small = override(training(llama3_2("1B")), {"model.depth": 2})
    (only,) = autoshard.rank([(small, 1000)], Topology.parse("v5e:1x1")).fitting
    assert set(only.mesh.sizes.values()) == {1}


def test_a_model_that_one_device_cannot_hold_is_split():
    ranking = autoshard.rank([(training(llama3("8B"), rows=256), IDS)], POD)
    assert 4 * 4 * count.parameters(llama3("8B"), IDS) > POD.chip.memory  # a whole copy
    for one in ranking.fitting:
        sizes = one.mesh.sizes
        assert sizes["fsdp"] * sizes["tensor"] * sizes["sequence"] * sizes["stage"] >= 8
    assert ranking.best.mesh.sizes["fsdp"] > 1


def test_all_that_is_offered_divides_the_model_and_fits():
    experiment = training(mixtral(), rows=64)
    ranking = autoshard.rank([(experiment, 32_000)], Topology.parse("v5p:4x4x4"))
    for one in ranking.fitting:
        assert math.prod(one.mesh.sizes.values()) == 64
        check_mesh(experiment, one.mesh)
        assert one.memory <= ranking.topology.chip.memory
    assert {one.mesh.sizes["expert"] for one in ranking.fitting} >= {1, 2, 4, 8}
    assert max(one.mesh.sizes["expert"] for one in ranking.fitting) == 8  # as many as there are
    seconds = [one.seconds for one in ranking.fitting]
    assert seconds == sorted(seconds)


def test_only_mixtures_have_an_expert_axis():
    assert {one.mesh.expert for one in autoshard.rank([(training(llama3_2("1B")), IDS)], HOST).fitting} == {1}


def test_stages_are_filled_with_micro_batches():
    found = autoshard.rank([(training(llama3_2("1B"), rows=64), IDS)], HOST).fitting
    staged = [one for one in found if one.mesh.stage == 4 and one.mesh.data == 2]
    assert [one.mesh.microbatches for one in staged] == [32, 16, 8, 4]  # the more, the less idle
    assert "mesh.microbatches=32" in staged[0].flags


def test_layers_that_scan_on_tpus_are_offered_stages_from_any_machine():
    automatic = override(training(llama3_2("1B"), rows=64), {"model.layers": "auto"})
    assert {one.mesh.stage for one in autoshard.rank([(automatic, IDS)], HOST).fitting} >= {1, 2}


def test_where_nothing_fits_the_least_is_named():
    with pytest.raises(
        ConfigError,
        match=r"--autoshard none of \d+ meshes fits: \w+=.* needs the least, \d+\.\d of 11\.8 GiB a device, 75%",
    ):
        autoshard.rank([(training(llama3("8B")), IDS)], HOST)
    one_head = {"model.attention.heads": 1, "model.attention.kv_heads": 1, "model.depth": 1}
    odd = override(training(llama3_2("1B"), rows=3, length=63), one_head)
    with pytest.raises(ConfigError, match="no mesh of 8 devices divides the model and its 3 rows"):
        autoshard.rank([(odd, IDS)], HOST)


def test_all_arms_take_the_mesh():
    base = training(llama3_2("1B"), rows=16)
    mixture = MoE(experts=2, active=1, expert=Gated(units=512))
    ablation = Ablation(question="?", base=base, scientific=Arms({"dense": {}, "experts": {"model.ffn": mixture}}), seeds=1)
    ranking = autoshard.of_ablation(ablation, HOST)
    assert len(ranking.best.estimates) == 2
    assert {one.mesh.expert for one in ranking.fitting} == {1}  # the first arm has none


def test_slices_hold_replicas():
    ranking = autoshard.rank([(training(llama3_2("1B"), rows=64), IDS)], Topology.parse("v5e:2x4", slices=2))
    assert {one.mesh.replica for one in ranking.fitting} == {2}
    assert all(math.prod(one.mesh.sizes.values()) == 16 for one in ranking.fitting)


def test_the_table_shows_the_best_ten():
    ranking = autoshard.rank([(training(llama3_2("1B"), rows=64), IDS)], HOST)
    table = autoshard.table(ranking, 64 * 2048)
    assert table.row_count == min(len(ranking.fitting), 10)
    assert f"{len(ranking.fitting)} of {ranking.tried} fit" in table.title


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────
def devices(kind, shape, *, cores=1, slices=1):
    return [
        SimpleNamespace(device_kind=kind, coords=(x, y, z), slice_index=number, core_on_chip=core)
        for number in range(slices)
        for x in range(shape[0])
        for y in range(shape[1])
        for z in range(shape[2])
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    "given, name, slices",
    [
        (devices("TPU v5 lite", (4, 4, 1)), "v5e:4x4", 1),
        (devices("TPU v5", (2, 2, 4)), "v5p:2x2x4", 1),
        (devices("TPU7x", (2, 2, 1), cores=2), "tpu7x:2x2x1", 1),
        (devices("TPU v6 lite", (4, 4, 1), slices=3), "v6e:4x4", 3),
    ],
)
def test_the_slices_that_are_attached(given, name, slices):
    found = autoshard.attached(given)
    assert (found.name, found.slices) == (name, slices)


def test_other_machines_are_told_what_there_is():
    with pytest.raises(ConfigError, match=r"not those of 'cpu'.*compile --autoshard --topology"):
        autoshard.attached([SimpleNamespace(device_kind="cpu")])
    with pytest.raises(ConfigError, match="sees 15 devices that are no whole slices"):
        autoshard.attached(devices("TPU v5 lite", (4, 4, 1))[:-1])


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_axis_that_splits_weights_divides_what_a_device_holds():
    experiment, all_of_it = training(mixtral(), rows=64), count.parameters(mixtral(), 32_000)
    assert footprint.held(experiment, 32_000, {"data": 8, "replica": 2}) == pytest.approx(all_of_it, rel=1e-6)
    for axis in ("fsdp", "sequence", "expert", "tensor"):
        assert footprint.held(experiment, 32_000, {axis: 8}) == pytest.approx(all_of_it / 8, rel=1e-3)
    tables = 2 * 32_000 * 4096
    assert footprint.held(experiment, 32_000, {"stage": 8}) == pytest.approx((all_of_it - tables) / 8 + tables, rel=1e-3)


def test_rows_that_devices_share_are_kept_once():
    experiment = training(llama3("8B"), rows=64)
    alone = footprint.kept(experiment, IDS, {})
    for axis in ("data", "fsdp", "replica", "expert"):
        assert footprint.kept(experiment, IDS, {axis: 8}) == pytest.approx(alone / 8, rel=0.35)  # logits are of one block
    staged = override(experiment, {"mesh.microbatches": 64})  # whose 7 idle turns keep as much
    assert footprint.kept(staged, IDS, {"stage": 8}) == pytest.approx(alone / 8 * (1 + 7 / 64), rel=0.35)
    assert footprint.kept(experiment, IDS, {"tensor": 8}) > alone / 8  # the stream is whole on each


def test_mesh_settings_other_than_sizes_stay():
    experiment = override(training(llama3_2("1B")), {"mesh": Mesh(offload=True, context="ring")})
    best = autoshard.rank([(experiment, IDS)], HOST).best
    assert best.mesh.offload
    assert best.mesh.context == "ring"
