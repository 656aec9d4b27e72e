import pytest

from llm_jax.core.config import override
from llm_jax.core.written import override_text
from llm_jax.data.pipeline import Data
from llm_jax.lab.advice import changes
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.footprint import kept
from llm_jax.models import count
from llm_jax.models.decoder import Decoder
from llm_jax.train.ahead.memory import TOGETHER, Memory

MODEL = Decoder(width=256, depth=8)
EXPERIMENT = Experiment(model=MODEL, data=Data(sequence_length=1024, batch_size=64))
MESH = {"population": 1, "data": 1, "fsdp": 8, "tensor": 1}
HUGE = Memory({TOGETHER: 1e12})


def advised(experiment=EXPERIMENT, mesh=MESH, memory=HUGE):
    return {one.flag: one for one in changes(experiment, 4096, mesh, memory)}


def test_the_first_saves_most_and_every_flag_can_be_typed():
    found = changes(EXPERIMENT, 4096, MESH, HUGE)
    assert [one.saves for one in found] == sorted((one.saves for one in found), reverse=True)
    assert {"model.remat=full", "train.accumulate=2", "data.batch_size=32", "data.sequence_length=512", "optimizer=Lion()"} <= set(
        advised()
    )
    for one in found:
        if "devices" not in one.flag:
            override_text(EXPERIMENT, one.flag.split())


def test_savings_are_the_analytic_models():
    whole, less = (kept(override(EXPERIMENT, {"model.remat": remat}), 4096, MESH) for remat in ("none", "full"))
    assert advised()["model.remat=full"].saves == whole - less > 0
    parameters = 4.0 * count.parameters(MODEL, 4096)
    assert advised()["optimizer=Lion()"].saves == pytest.approx(parameters / 8)  # one number a parameter less, over 8 devices
    spread = advised(mesh=MESH | {"data": 2, "fsdp": 4})["mesh.fsdp=8 mesh.data=1"]
    assert spread.saves == pytest.approx(parameters * 4 / 4 / 2)


def test_no_change_saves_more_than_there_is():
    assert advised(memory=Memory({TOGETHER: 10.0}))["model.remat=full"].saves == 10


def test_what_has_been_done_or_does_not_divide_is_not_advised():
    done = override(EXPERIMENT, {"model.remat": "full", "data.batch_size": 8})
    assert not {"model.remat=full", "train.accumulate=2", "data.batch_size=4"} & set(advised(done))
