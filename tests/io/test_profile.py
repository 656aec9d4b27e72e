"""Where the time goes: shares that add up, kinds by what an operation is made of, and a trace of a training that is one."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.io import profile
from llm_jax.io.profile import Profiler, summary, summed
from llm_jax.train.loop import fit
from tests.train.test_loop import RHYTHM, feed, program, session


def traced(folder, function, *args, steps=5):
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    profiler = Profiler(folder, 0, steps, label="one")
    for step in range(steps):
        profiler.before(step, step + 1, [])
        profiler.after(step + 1, jax.block_until_ready(function(*args)))
    assert profiler.folder is None, "it has ended by itself"
    return json.loads((folder / profile.SUMMARY).read_text())


def products(a, b):
    return jax.lax.scan(lambda c, _: (0.001 * (c @ b), None), a, None, length=4)[0]


def elementwise(a, b):
    return jnp.sin(jnp.exp(jnp.sin(a)) * b).sum(0)


@pytest.mark.parametrize(
    "function, kind", [(products, "matrix products"), (elementwise, "fusions")], ids=["products", "elementwise"]
)
def test_the_kind_that_a_program_is_made_of_leads(tmp_path, function, kind):
    found = traced(tmp_path, function, jnp.ones((512, 512)), jnp.ones((512, 512)))
    assert found["label"] == "one" and found["steps"] == [0, 5] and list(tmp_path.rglob("*.xplane.pb"))
    assert sum(found["shares"].values()) == pytest.approx(1) and set(found["shares"]) == set(profile.KINDS)
    busy = {name: share for name, share in found["shares"].items() if name != "idle"}
    assert max(busy, key=busy.get) == kind and busy[kind] > 0.5 * sum(busy.values())
    assert found["top"][0]["kind"] == kind and sum(one["share"] for one in found["top"]) <= 1
    (trace,) = tmp_path.rglob("*.xplane.pb")
    for known in profile.classes(trace.read_bytes()).values():
        assert all(known[name.replace(".", "_").replace("-", "_")] for name in known), "as a GPU's kernels are called"


def test_collectives_of_several_devices_are_told(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    add = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    found = traced(tmp_path, add, jnp.ones((4, 1024)))
    assert found["devices"] == 4 and found["shares"]["collectives"] > 0


TPU = """
planes {{ name: "/device:TPU:{device}"
  lines {{ name: "XLA Modules" events {{ metadata_id: 9 offset_ps: 0 duration_ps: 100000 }} }}
  lines {{ name: "XLA Ops"
    events {{ metadata_id: 1 offset_ps: 0 duration_ps: 60000 }}
    events {{ metadata_id: 2 offset_ps: 10000 duration_ps: 20000 }}
    events {{ metadata_id: 3 offset_ps: 35000 duration_ps: 15000 }}
    events {{ metadata_id: 4 offset_ps: 80000 duration_ps: 20000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "%while.1 = (f32[]) while(f32[] %x)" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "%convolution_fusion.7 = f32[8] fusion(f32[8] %x)" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "%all-gather.3 = f32[8] all-gather(f32[4] %x)" }} }}
  event_metadata {{ key: 4 value {{ id: 4 name: "%copy.2 = f32[8] copy(f32[8] %x)" }} }}
  event_metadata {{ key: 9 value {{ id: 9 name: "jit_steps(3)" }} }} }}
"""


def test_a_loop_is_given_what_lies_between_its_operations(tmp_path):
    text = "".join(TPU.format(device=device) for device in range(2))
    (tmp_path / "one.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    found = summary(tmp_path)
    assert found["devices"] == 2 and found["seconds"] == pytest.approx(100e-9)
    shares = {"matrix products": 0.2, "collectives": 0.15, "other": 0.25, "copies": 0.2, "idle": 0.2}
    assert found["shares"] == pytest.approx(dict.fromkeys(profile.KINDS, 0.0) | shares)
    assert found["top"][0] == {"operation": "while.1", "kind": "other", "share": pytest.approx(0.25)}


GPU = """
planes { name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 30000 stats { metadata_id: 1 str_value: "command_buffer_7" } }
    events { metadata_id: 2 offset_ps: 30000 duration_ps: 20000 stats { metadata_id: 1 str_value: "command_buffer_7" } }
    events { metadata_id: 3 offset_ps: 50000 duration_ps: 20000 stats { metadata_id: 1 str_value: "command_buffer_7" } }
    events { metadata_id: 4 offset_ps: 70000 duration_ps: 10000 stats { metadata_id: 1 str_value: "command_buffer_7" } } }
  lines { name: "Stream #14"
    events { metadata_id: 5 offset_ps: 80000 duration_ps: 10000 stats { metadata_id: 1 str_value: "command_buffer_8" } }
    events { metadata_id: 6 offset_ps: 90000 duration_ps: 10000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT" } }
  event_metadata { key: 2 value { id: 2 name: "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma" } }
  event_metadata { key: 3 value { id: 3 name: "loop_multiply_fusion_12" } }
  event_metadata { key: 4 value { id: 4 name: "MemcpyD2D" } }
  event_metadata { key: 5 value { id: 5 name: "ncclDevKernel_AllReduce_Sum_bf16_RING_LL" } }
  event_metadata { key: 6 value { id: 6 name: "of no program" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }
"""


def test_kernels_of_a_gpus_command_buffer_are_told_by_their_names(tmp_path):
    (tmp_path / "one.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU))
    shares = {"matrix products": 3, "attention kernels": 2, "fusions": 2, "copies": 1, "collectives": 1}
    expected = {kind: shares.get(kind, 0) / 9 for kind in profile.KINDS}
    assert summary(tmp_path)["shares"] == pytest.approx(expected)


def test_nothing_traced_is_nothing_told(tmp_path):
    assert summary(tmp_path) is None and summed([]) is None
    (tmp_path / "one.xplane.pb").write_bytes(b"")
    assert summary(tmp_path) is None


def test_steps_are_traced_in_whole_dispatches_and_no_others(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    counted = program()

    def steps(state, batches):
        calls.append(int(state["step"][0]))
        return counted.steps(state, batches)

    for first, last, expected in ((3, 5, [0, "start", 2, 4, "stop", 6, 8, 10]), (9, 99, [0, 2, 4, 6, "start", 8, 10, "stop"])):
        calls.clear()
        fit(replace(counted, steps=steps), feed, RHYTHM, replace(session([]), profiler=Profiler(tmp_path, first, last)))
        assert calls == expected
    calls.clear()
    fit(replace(counted, steps=steps), feed, RHYTHM, replace(session([]), profiler=Profiler(tmp_path, 40, 50)))
    assert "start" not in calls


def test_what_goes_wrong_at_the_end_of_a_trace_is_told_and_not_hidden_by_another_end(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def full(folder):
        raise OSError("no room")

    monkeypatch.setattr(profile, "summary", full)
    profiler = Profiler(tmp_path, 0, 2)
    profiler.before(0, 2, [])
    with pytest.raises(OSError, match="no room"):
        profiler.after(2, [])
    profiler.close()
    assert calls == ["start", "stop"]


@pytest.mark.parametrize("text", ["10", "10:", "5:5", "-1:3", "a:b", "1:2:3"])
def test_steps_that_are_none_are_refused(text):
    from llm_jax.cli.run import _steps

    assert _steps("10:15") == (10, 15) and _steps(None) is None
    with pytest.raises(ConfigError, match="--profile must be FIRST:LAST"):
        _steps(text)
