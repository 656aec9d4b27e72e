from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.train.ahead import hlo, memory

REPORT = """Memory Space: default (color=0)
Total bytes: 3000 (2.93KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.00KiB( 34%);    1.00KiB;      3342336;                7; bf16[8,16], f32[256], 5×f32[16]
    1.50KiB( 51%);     512.0B;      2224275;                1; f32[128]
    1.96GiB( 99%);    1.96GiB;            0;                1; f32[4096,128256]
Memory Space: vmem (color=1)
Total bytes: 99 (99B)
    9.00GiB( 34%);    9.00GiB;      3342336;                7; bf16[8,16]
"""


def test_a_device_holds_its_share_of_what_is_split_and_all_of_the_rest():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp",), ()))
    tree = {
        "a": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split),
        "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=whole),
    }
    assert memory.on_device(tree) == 2 * 4 * 4 + 3 * 2


def analysis(*, argument, temp, output=0, alias=0, generated_code=0):
    """As XLA's `memory_analysis()` has it."""
    sizes = {"argument": argument, "temp": temp, "output": output, "alias": alias, "generated_code": generated_code}
    return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})


def test_parts_add_up_to_what_xla_says():
    stats = analysis(argument=1000, temp=300, output=900, alias=880, generated_code=7)
    found = memory.of_program(stats, {"parameters": 600, "batch": 300}, REPORT)
    assert found.parts == {"parameters": 600, "batch": 300, "padding": 100, memory.TOGETHER: 300, "output": 20, "program": 7}
    assert found.total == 1000 + 300 + 20 + 7


PROGRAM = """HloModule m

%body (carry: (f32[8])) -> (f32[8]) {
  ROOT %carry = (f32[8]) parameter(0)
}

%condition (carried: (f32[8])) -> pred[] {
  %carried = (f32[8]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %judged = (f32[8]) while(%a), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/shard_map/gradient/while"}
  %kept = f32[8] copy(%a), metadata={op_name="jit(step)/jvp(Decoder)/mul"}
  %again = f32[8] copy(%kept), metadata={op_name="jit(step)/transpose(jvp(Decoder))/rematted_computation/mul"}
  %back = f32[8] copy(%again), metadata={op_name="jit(step)/transpose(jvp(Decoder))/mul"}
  %all-gather.1 = f32[8] copy(%back), metadata={op_name="jit(step)/jvp(Decoder)/dot_general"}
  ROOT %moved = f32[8] copy(%all-gather.1)
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[8]| at ShapeIndex {}:
 value: <1 a @0> (size=4096,offset=0): f32[8]{0}
allocation 1: size 900, preallocated-temp:
 value: <2 kept @0> (size=100,offset=0): f32[8]{0}
 value: <3 again{} @0> (size=200,offset=128): f32[8]{0}
 value: <4 back{} (phi) @0> (size=300,offset=384): f32[8]{0}
 value: <5 all-gather.1{} @0> (size=50,offset=768): f32[8]{0}
 value: <8 carry{0} (phi) @0> (size=40,offset=840): f32[8]{0}
 value: <6 moved{} @0> (size=350,offset=384): f32[8]{0}
allocation 2: size 9000, color 2, preallocated-temp:
 value: <7 kept{1} @2> (size=9000,offset=0): f32[8]{0}
"""
RANGES = """  BufferLiveRange:
    a{}:0-9
    kept{}:1-6
    again{}:2-4
    back{}:3-4
    all-gather.1{}:4-5
    carry{0}:4-4
    moved{}:5-6
  Live ranges at 4 (peak):
    back{}: 300 bytes (cumulative: 300 bytes)
"""


def test_what_is_there_when_most_is_told_apart():
    """At 4 it is 100 + 200 + 300 + 50 + 40; what shares the place of another has it later."""
    module = hlo.parse(PROGRAM)
    peak = memory.at_peak(ASSIGNMENT, RANGES, module)
    assert peak == {"activations": 100 + 200, "gradients": 300 + 40}
    found = memory.of_program(analysis(argument=4096, temp=900), {"parameters": 4096}, peak=peak)
    assert found.parts == {"parameters": 4096, "activations": 300, "gradients": 340, "temporaries": 260}
    assert found.working == 900
    assert memory.at_peak("", "", module) == {}


def test_what_does_not_fit_is_known_from_the_report_alone():
    found = memory.of_program(None, {"parameters": 1000}, REPORT).parts  # the end of the last place, whatever lies before it
    assert found == {"parameters": 1000, memory.TOGETHER: pytest.approx(1.96 * 2**30)}


def test_the_largest_places_of_hbm_the_largest_first():
    found = memory.largest(REPORT)
    assert [one.bytes for one in found] == pytest.approx([1.96 * 2**30, 1024, 512])
    assert found[1].what == "f32[256], bf16[8,16], f32[16]"
