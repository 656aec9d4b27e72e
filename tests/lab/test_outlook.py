import io
import json

import pytest
from rich.console import Console

from llm_jax.core.chips import GIB, Topology
from llm_jax.data.pipeline import Data
from llm_jax.lab import outlook
from llm_jax.lab.ahead import Examined
from llm_jax.lab.experiment import Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.train.ahead import roofline
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.ahead.flops import Flops
from llm_jax.train.ahead.memory import TOGETHER, Largest, Memory

POD = Topology.parse("v5e:16x16")
EXPERIMENT = Experiment(model=Decoder(width=256, depth=4), data=Data(batch_size=512))


def examined(temporary):
    sent = (Collective("all-gather", 2.0**20, 256, ("fsdp",), "bf16", count=64, overlaps=True, label="layers/ffn"),)
    estimate = roofline.estimate(products=1e13, memory=1e9, collectives=sent, topology=POD, model=256e13 * 0.75)
    memory = Memory({"parameters": 2.0 * GIB, TOGETHER: temporary}, (Largest(GIB, "f32[4096,128256]"),))
    mesh = {"population": 1, "data": 1, "fsdp": 256, "tensor": 1}
    return Examined(POD, mesh, 10**9, 10**6, 256e13 * 0.75, Flops(256e13), 1e13, memory, sent, estimate, 2, 12.0, 0)


def shown(*tables):
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_a_program_that_fits_has_memory_messages_and_time():
    found = examined(1.0 * GIB)
    text = shown(*outlook.tables("base", EXPERIMENT, found))
    assert found.fits
    for said in ("3.00 of 15.75 GiB", "v5e:16x16, 256 chips, fsdp=256", "all-gather", "layers/ffn", f"= {found.estimate.mfu:.1%}"):
        assert said in text
    assert "What to change" not in text


def test_one_that_does_not_is_told_by_how_much_and_what_to_change():
    found = examined(20.0 * GIB)
    text = shown(*outlook.tables("base", EXPERIMENT, found))
    assert not found.fits
    for said in ("6.25 GiB too many", "f32[4096,128256]", "model.remat=full", "optimizer=Lion()"):
        assert said in text


def test_an_ablation_has_a_row_a_program():
    text = shown(outlook.summary("Which?", {"a, b": examined(GIB), "c": examined(20.0 * GIB)}))
    rows = [line for line in text.splitlines() if "GiB" in line]
    assert len(rows) == 2
    assert "does not fit" not in rows[0]
    assert "does not fit" in rows[1]


def test_a_step_is_one_of_those_in_a_call():
    found = examined(GIB)
    assert found.step == pytest.approx(found.estimate.seconds / 2)
    assert json.loads(json.dumps(outlook.as_json(found)))["step_seconds"] == found.step
