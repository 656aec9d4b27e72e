"""Axes that do not divide what they are to split: one sentence with the way out, before anything is compiled."""

import math

import pytest

from llm_jax.core import sharding
from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import Mesh, Split, across_slices
from llm_jax.data.pipeline import Data
from llm_jax.lab.components import MLA, Attention, Decoder, Gated, Layer, MoE
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.population import check_mesh

BASE = Experiment(
    data=Data(sequence_length=24, batch_size=16),
    model=Decoder(width=24, depth=3, attention=Attention(heads=6, kv_heads=2), ffn=Gated(units=60), layers="scanned"),
)
FEW = {"model.ffn": MoE(experts=6, expert=Gated(units=30))}
REFUSED = {
    "heads": ({"tensor": 4}, {}, "model.attention.heads must be a multiple of mesh.tensor = 4, got 6: take 8, or mesh.tensor = 3"),
    "latent heads": (
        {"tensor": 2},
        {"model.attention": MLA(heads=3)},
        "model.attention.heads must be a multiple of mesh.tensor = 2",
    ),
    "hidden units": (
        {"tensor": 3},
        {"model.ffn": Gated(units=40)},
        "model.ffn.units must be a multiple of mesh.tensor = 3, got 40: take 39, or mesh.tensor = 2",
    ),
    "experts": ({"expert": 4}, FEW, "model.ffn.experts must be a multiple of mesh.expert = 4, got 6: take 8, or mesh.expert = 3"),
    "experts' units": (
        {"tensor": 4},
        FEW | {"model.attention.heads": 4},
        "model.ffn.expert.units must be a multiple of mesh.tensor = 4, got 30: take 32, or mesh.tensor = 3",
    ),
    "a layer of the pattern": (
        {"tensor": 2},
        {"model.pattern": (Layer(), Layer(attention=Attention(heads=3)))},
        "model.pattern[1].attention.heads must be a multiple of mesh.tensor = 2, got 3",
    ),
    "layers": ({"stage": 2}, {}, "model.depth must be a multiple of mesh.stage = 2, got 3: take 4, or mesh.stage = 1"),
    "layers and rounds": (
        {"stage": 3, "rounds": 2},
        {"data.batch_size": 18},
        "model.depth must be a multiple of mesh.stage × mesh.rounds = 6, got 3: take 6",
    ),
    "layers of their own": (
        {"stage": 2},
        {"model.layers": "unrolled"},
        "model.layers must be 'scanned' to be split over mesh.stage=2",
    ),
    "micro-batches": (
        {"stage": 2, "microbatches": 3},
        {"model.depth": 4},
        "mesh.microbatches must be a multiple of stage=2 that divides the 16 rows of each part of the mesh, got 3",
    ),
    "tokens": (
        {"sequence": 5},
        {},
        "data.sequence_length must be a multiple of mesh.sequence = 5, got 24: take 25, or mesh.sequence = 4",
    ),
    "rows": (
        {"fsdp": 3},
        {},
        "data.batch_size must be a multiple of train.accumulate × data × fsdp = 3 on this mesh, got 16: take 18",
    ),
    "rules": ({"rules": (Split("hed", ()),)}, {}, "mesh.rules names 'hed': did you mean"),
    "rows' rule": ({"rules": (Split("batch", ()),)}, {}, "mesh.rules splits 'batch', which is always split over replica, data,"),
}


@pytest.mark.parametrize("axes, changes, sentence", REFUSED.values(), ids=REFUSED)
def test_what_does_not_divide_is_a_sentence(axes, changes, sentence):
    mesh = Mesh(**{"data": 1} | axes)
    with pytest.raises(ConfigError) as error:
        check_mesh(override(BASE, changes), mesh)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "axes", [{"tensor": 2}, {"tensor": 6}, {"stage": 3}, {"sequence": 8}, {"fsdp": 16}, {"data": 2, "fsdp": 4}]
)
def test_what_divides_is_taken(axes):
    check_mesh(override(BASE, {"data.batch_size": 48}), Mesh(**{"data": 1} | axes))


def test_a_rule_over_an_axis_that_is_not_there():
    with pytest.raises(ConfigError, match=r"rules splits 'embed' over \['fdsp'\]: the axes are stage, replica, data, fsdp"):
        Mesh(rules=(Split("embed", ("fdsp",)),))


def test_a_rule_takes_the_place_of_the_one_that_there_is():
    whole = {**sharding.RULES, "embed": ()}
    assert sharding.rules(Mesh(rules=(Split("embed"),))) == whole


@pytest.mark.parametrize(
    "axes, slices, across",
    [
        ({"data": 8}, 4, {"data": 4}),
        ({"replica": 2, "data": 4, "fsdp": 4}, 4, {"replica": 2, "data": 2}),
        ({"stage": 2, "fsdp": 16}, 4, {"stage": 2, "fsdp": 2}),
        ({"population": 2, "fsdp": 4}, 2, {"population": 2}),
    ],
)
def test_slices_hold_blocks_of_the_axes_that_say_least(axes, slices, across):
    shape = Mesh(**{"data": 1} | axes).shape(math.prod(axes.values()))
    assert {axis: n for axis, n in across_slices(shape, slices).items() if n > 1} == across


def test_axes_that_do_not_divide_into_slices():
    shape = Mesh(data=6, tensor=2).shape(12)
    with pytest.raises(ConfigError) as error:
        across_slices(shape, 8)
    told = "mesh data=6 × tensor=2 cannot be divided into 8 slices, which must all be of one form: set replica or data to 8"
    assert str(error.value) == told
