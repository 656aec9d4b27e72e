"""The model of time against published runs (`tests/benchmarks/estimates.py`) and, for every axis, against closed forms."""

from dataclasses import replace

import pytest

from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.pipeline import Data
from llm_jax.lab.expected import estimate, filled, shown
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.messages import messages
from llm_jax.models import count
from llm_jax.models.presets.modern import llama3, mixtral
from llm_jax.nn.dispatch import Dropless
from llm_jax.nn.linear import Precision
from tests.benchmarks.estimates import PUBLISHED, expected, scaled


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_met_within_ten_points(name):
    run = PUBLISHED[name]
    assert count.parameters(run.model, run.vocabulary) / 1e9 == pytest.approx(run.billions, rel=0.03)
    assert run.estimate().mfu == pytest.approx(run.mfu, abs=0.1)


def test_more_tokens_hide_more_of_the_messages_and_tensor_parallelism_costs():
    given = {"vocabulary": 32_000, "length": 2048}
    few, many = (expected(scaled(4096, 32, 14_336, 32), "v5e:16x16", rows=rows, fsdp=256, **given) for rows in (1, 8))
    assert many.mfu > few.mfu
    split = expected(scaled(4096, 32, 14_336, 32), "v5e:16x16", rows=8, fsdp=16, tensor=16, **given)
    assert split.ici > many.ici
    assert split.products == pytest.approx(many.products)


def test_a_machine_without_neighbours_sends_nothing():
    found = expected(scaled(512, 4, 2048, 2), "v5e:1x1", vocabulary=1000, length=512, rows=1)
    assert (found.ici, found.dcn) == (0, 0)


def test_attention_skips_what_its_mask_hides():
    from llm_jax.nn.attention import Causal, SlidingWindow
    from llm_jax.nn.masks import Bidirectional

    with platform.targeting("tpu"):  # blocks of 512
        assert shown(Causal(), 8192) == (16 + 1) / 32
        assert shown(Bidirectional(), 8192) == 1
        assert shown(SlidingWindow(512), 8192) == (1 + 15 * 2) / 16**2


# ── messages of every axis ───────────────────────────────────────────────────────────────────────────────────────────
POD, IDS = Topology.parse("v5p:4x4x4"), 32_000


def training(model, *, rows=64, length=4096, mesh=None):
    whole = replace(model, remat="full", layers="scanned", precision=Precision("bfloat16"))
    return Experiment(model=whole, data=Data(sequence_length=length, batch_size=rows), mesh=mesh or Mesh())


def sent(experiment, axis, **mesh):
    """Bytes that travel a step along this axis alone, by kind of message."""
    tokens = experiment.data.batch_size * experiment.data.sequence_length / 64
    found = {}
    for one in messages(experiment, IDS, mesh, tokens, POD):
        if one.axes == (axis,):
            found[one.kind] = found.get(one.kind, 0) + one.bytes * one.count
    return found


def test_tokens_travel_to_their_experts_and_back():
    experiment = training(mixtral())
    stream = 2 * 4096 * 4096  # bytes of the one row of a device
    assert sent(experiment, "expert", fsdp=8, expert=8) == {"all-to-all": pytest.approx(32 * 2 * 3 * 2 * stream)}
    assert sent(training(llama3("8B")), "expert", fsdp=8, expert=8) == {}


def test_weights_of_experts_stay_with_them():
    experiment, banks = training(mixtral()), 32 * 8 * 3 * 4096 * 14_336
    along = sent(experiment, "fsdp", fsdp=8, expert=8)
    assert along["all-gather"] == pytest.approx(2 * 2 * banks / 8)
    assert along["reduce-scatter"] == pytest.approx(2 * banks / 8)


def test_a_few_rows_of_a_matrix_on_each_device_are_added_up_instead_of_gathered():
    wide = Topology.parse("v5p:8x8x8")
    kinds = {
        devices: {
            one.kind for one in messages(training(llama3("8B"), rows=512), IDS, {"fsdp": devices}, 8192, wide) if one.overlaps
        }
        for devices in (256, 512)
    }
    assert kinds == {256: {"all-gather", "reduce-scatter"}, 512: {"all-reduce"}}


def test_keys_and_values_are_gathered_or_go_round():
    pieces, rest = 2 * 4096 * 2 * 8 * 128, 32 * 2 * (2 + 1) * 2 * 4096 * 4096  # of a device; queries and results, dealt and back
    gathered = sent(training(llama3("8B")), "sequence", fsdp=16, sequence=4)
    assert gathered["all-gather"] == pytest.approx(32 * 2 * 4 * pieces)
    assert gathered["reduce-scatter"] == pytest.approx(32 * 4 * pieces)
    assert gathered["collective-permute"] == pytest.approx(rest)
    ring = sent(training(llama3("8B"), mesh=Mesh(context="ring")), "sequence", fsdp=16, sequence=4)
    assert ring == {"collective-permute": pytest.approx(rest + 32 * (3 * 2 + 4 * 3) * pieces)}


def test_stages_wait_for_the_first_rows():
    experiment = training(llama3("8B"), mesh=Mesh(microbatches=8))
    alone, staged = (estimate(experiment, IDS, mesh, POD) for mesh in ({"fsdp": 64}, {"fsdp": 16, "stage": 4}))
    head = 6 * IDS * 4096 * 4096 / (0.93 * 459e12)  # of all rows, on all stages
    assert staged.products - head == pytest.approx((alone.products - head) * (1 + 3 / 8))
    rounds = override(experiment, {"mesh.rounds": 2})
    assert estimate(rounds, IDS, {"fsdp": 16, "stage": 4}, POD).products - head == pytest.approx(
        (alone.products - head) * (1 + 3 / 16)
    )
    moving = sent(training(mixtral(), mesh=Mesh(microbatches=8)), "expert", fsdp=2, stage=4, expert=8)  # in idle turns too
    assert moving == {"all-to-all": pytest.approx(32 * 2 * 3 * 2 * 2 * 4096 * 4096 * 11 / 8)}
    whole = 2 * 4 * 4096 * 4096  # bytes of the rows of four stages
    along = sent(experiment, "stage", fsdp=16, stage=4)
    assert along == {
        "collective-permute": pytest.approx(whole / 8 * (8 + 3) * 2),
        "all-gather": 2 * whole,
        "reduce-scatter": 2 * whole,
    }


def test_copies_add_up_their_parts_of_the_gradients():
    experiment, layers = training(llama3("8B")), count.parameters(llama3("8B"), IDS) - 2 * IDS * 4096
    found = sent(experiment, "replica", replica=4, fsdp=16)
    assert found == sent(experiment, "data", data=4, fsdp=16)
    assert found["all-reduce"] == pytest.approx(2 * (layers + 2 * IDS * 4096) / 16, rel=1e-5)


def test_what_lies_between_slices_goes_over_the_network():
    two = Topology.parse("v5p:4x4x4", slices=2)
    experiment = training(llama3("8B"), rows=128)
    found = estimate(experiment, IDS, {"replica": 2, "fsdp": 64}, two)
    assert found.dcn > 0
    tokens = 128 * 4096 / 128
    crossing = [one for one in messages(experiment, IDS, {"replica": 2, "fsdp": 64}, tokens, two) if one.crosses]
    assert {one.axes for one in crossing} == {("replica",)}


def test_experts_multiply_the_rows_that_came_and_not_the_room_for_more():
    roomy = override(training(mixtral()), {"model.ffn.dispatch": Dropless(room=2.0)})
    assert filled(roomy, {"expert": 8}) == pytest.approx(0.5, rel=1e-3)
    assert filled(roomy, {"expert": 1}) == filled(training(llama3("8B")), {"fsdp": 8}) == 1
    assert filled(training(mixtral()), {"expert": 4}) == pytest.approx(0.25, rel=1e-3)
