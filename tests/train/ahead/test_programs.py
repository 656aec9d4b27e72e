"""Programs that XLA compiles for eight CPU devices, and lines of programs that it compiled for TPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.train.ahead import collectives, hlo, operations

AXES = {"data": 2, "fsdp": 4}
WIDTH = 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 2)


def compiled(function, *args):
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def on(mesh, *spec):
    return jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_products_in_a_scan_are_counted_by_its_turns():
    x = jnp.ones((WIDTH, WIDTH))
    module = compiled(lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y) @ y, None), x, length=5)[0], x)
    assert sum(one.flops * one.times for one in operations.of_module(module)) == 5 * 2 * WIDTH**3
    assert module.unknown == 0


def test_a_loop_whose_length_the_data_decides_is_counted_once_and_told():
    x = jnp.ones((WIDTH, WIDTH))
    module = compiled(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: jnp.sin(y) @ y, x), x, 3)
    assert sum(one.flops * one.times for one in operations.of_module(module)) == 2 * WIDTH**3
    assert module.unknown == 1


@pytest.mark.parametrize(
    "send, out, kind, part",
    [
        (lambda x: jax.lax.psum(x, "fsdp"), (None,), "all-reduce", 1 / 4),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), (None,), "all-gather", 1),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), ("fsdp",), "reduce-scatter", 1 / 4),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), (None, "fsdp"), "all-to-all", 1 / 4),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), ("fsdp",), "collective-permute", 1 / 4),
    ],
)
def test_kinds_bytes_and_axes_in_a_scan(mesh, send, out, kind, part):
    def function(x):
        given = {"mesh": mesh, "in_specs": PartitionSpec("fsdp"), "out_specs": PartitionSpec(*out), "check_vma": False}
        sent = jax.shard_map(send, **given)
        return jax.lax.scan(lambda total, _: (total + sent(jnp.sin(total))[0, 0] * x, None), x, length=3)[0]

    found = [one for one in collectives.of_module(compiled(function, on(mesh, "fsdp")), AXES) if one.kind == kind]
    most = max(found, key=lambda one: one.bytes)
    assert (most.bytes, most.dtype, most.axes) == (4 * WIDTH**2 * part, "f32", ("fsdp",))
    assert most.count == 3
    assert most.parts == 4


def test_an_fsdp_product_gathers_its_weight_over_the_axis_that_splits_it(mesh):
    module = compiled(lambda x, w: jnp.tanh(x @ w), on(mesh, ("data", "fsdp")), on(mesh, "fsdp"))
    (found,) = collectives.of_module(module, AXES)
    assert (found.kind, found.bytes, found.axes, found.count) == ("all-gather", 4 * WIDTH**2, ("fsdp",), 1)
    assert found.travels == found.bytes * 3 / 4


def test_devices_of_two_slices_cross_between_them(mesh):
    module = compiled(lambda x: x.sum(), on(mesh, "data"))
    slices = [0] * 4 + [1] * 4  # the data axis lies between slices
    assert {one.axes: one.crosses for one in collectives.of_module(module, AXES, slices)} == {("data",): True}
    module = compiled(lambda x: x.sum(), on(mesh, "fsdp"))
    assert {one.axes: one.crosses for one in collectives.of_module(module, AXES, slices)} == {("fsdp",): False}


ASIDE = """HloModule m

%called (p: bf16[4,64]) -> bf16[16,64] {
  %p = bf16[4,64] parameter(0)
  ROOT %all-gather = bf16[16,64] all-gather(%p), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%async (p.1: bf16[4,64]) -> bf16[16,64] {
  %p.1 = bf16[4,64] parameter(0)
  ROOT %custom-call = bf16[16,64] custom-call(%p.1), custom_call_target="offloaded", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[4,64]) -> bf16[16,64] {
  %a = bf16[4,64] parameter(0)
  %start = ((bf16[4,64]), bf16[16,64], u32[]) async-start(%a), async_execution_thread="sparsecore", calls=%async
  ROOT %done = bf16[16,64] async-done(%start)
}
"""


def test_messages_of_another_core_overlap():
    module = hlo.parse(ASIDE)
    (found,) = collectives.of_module(module, {"a": 4})
    assert (found.kind, found.bytes, found.count, found.overlaps) == ("all-gather", 2 * 16 * 64, 1, True)
    assert all(one.overlaps for one in operations.of_module(module))


SEND = """HloModule m

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = bf16[8,128] parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[8,128], u32[], token[]) send(%a, %after-all), channel_id=2, x={_xla_megascale_transfer_type="KIND"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
}
"""


@pytest.mark.parametrize("kind, size", [("ALL_REDUCE", 2048), ("REDUCE_SCATTER", 2048), ("ALL_GATHER", 4096)])
def test_what_goes_over_the_network_between_slices(kind, size):
    module = hlo.parse(SEND.replace("KIND", kind))
    (found,) = collectives.of_module(module, AXES, [0] * 4 + [1] * 4)
    assert found.kind == kind.lower().replace("_", "-")
    assert (found.bytes, found.parts, found.axes, found.crosses, found.count) == (size, 2, ("data",), True, 1)
    assert operations.of_module(module) == []


@pytest.mark.parametrize(
    "text, members",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", list(range(8))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
        ("channel_id=1", list(range(8))),
    ],
)
def test_groups_in_all_the_ways_that_xla_writes_them(text, members):
    assert collectives.members(text, 8) == members


TPU = """HloModule jit_step, is_scheduled=true

%cond (param: (s32[], bf16[4,64])) -> pred[] {
  %param = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %index = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%begin (p0: bf16[4,64]) -> (bf16[4,64], bf16[16,64]) {
  %p0 = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%p0), channel_id=3, replica_groups=mesh['a'=4] {'a'}, attributes={chain_id="1"}
  ROOT %custom-call = (bf16[4,64]{1,0}, bf16[16,64]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (p0: bf16[4,64]) -> bf16[16,64] {
  %p0.1 = bf16[4,64]{1,0} parameter(0)
  %all-gather.2 = bf16[16,64]{1,0} all-gather(%p0.1), channel_id=3, replica_groups=mesh['a'=4] {'a'}, attributes={chain_id="1"}
  ROOT %custom-call.1 = bf16[16,64]{1,0} custom-call(%p0.1, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.2 (input: f32[16,64]) -> f32[4,64] {
  %input = f32[16,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[16,64]{1,0} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.3 = f32[4,64]{1,0} dynamic-slice(%all-reduce.5, %c, %c), dynamic_slice_sizes={4,64}
}

%sliced (p0: bf16[7,4,64], p1: s32[]) -> bf16[4,64] {
  %p0.2 = bf16[7,4,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = bf16[1,4,64]{2,1,0} dynamic-slice(%p0.2, %p1, %p1, %p1), dynamic_slice_sizes={1,4,64}
  ROOT %bitcast = bf16[4,64]{1,0} bitcast(%slice)
}

%body (param.1: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %param.1 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, bf16[7,4,64]{2,1,0}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %x = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%param.1), index=1
  %stack = bf16[7,4,64]{2,1,0} get-tuple-element(%param.1), index=2
  %taken = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %index.1), kind=kLoop, calls=%sliced
  %start = (bf16[4,64]{1,0}, bf16[16,64]{1,0}) fusion(%taken), kind=kCustom, calls=%begin
  %done = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%end, metadata={op_name="layer/weights"}
  %wide = bf16[16,4]{1,0} convolution(%done, %x), dim_labels=bf_oi->bf
  %grads = f32[4,64]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.2, metadata={op_name="layer/gradient"}
  ROOT %tuple = (s32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%index.1, %x)
}

ENTRY %main (p: bf16[4,64]) -> bf16[4,64] {
  %p = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %init = (s32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%zero, %p)
  %while = (s32[]{:T(128)}, bf16[4,64]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[4,64]{1,0} get-tuple-element(%while), index=1
}
"""


def test_turns_messages_in_steps_and_scattered_sums_of_tpus():
    module = hlo.parse(TPU)
    assert module.calls == {"main": 1, "body": 5}  # from 2 up to 7
    gathered, summed = sorted(collectives.of_module(module, {"a": 4}), key=lambda one: one.kind)
    assert (gathered.kind, gathered.count, gathered.overlaps) == ("all-gather", 5, True)  # begun and ended, but one message
    assert (summed.kind, summed.count, summed.overlaps, summed.label) == ("reduce-scatter", 5, False, "layer/gradient")
    assert (gathered.bytes, summed.bytes) == (2 * 16 * 64, 4 * 16 * 64)


def test_a_body_that_was_unrolled_counts_by_more_than_one():
    by_two = TPU.replace(
        "  ROOT %tuple = (s32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%index.1, %x)",
        """  %one = s32[] constant(1)
  %next = s32[] add(%index.1, %one)
  %after = s32[] add(%one, %next)
  ROOT %tuple = (s32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%after, %x)""",
    )
    assert hlo.parse(by_two).calls["body"] == 3  # 2, 4, 6


def test_slices_of_a_stack_are_read_alone_and_what_lies_beside_the_arithmetic_is_free():
    found = {one.name: one for one in operations.of_module(hlo.parse(TPU))}
    assert found["taken"].bytes == 2 * 4 * 64 + 4  # of the stack one layer, and the index; written inside
    assert found["start"].bytes == found["done"].bytes == 0
    assert found["taken"].times == 5


@pytest.mark.parametrize(
    "window, labels, sizes, flops",
    [
        ("", "bf_io->bf", ((3, 5), (5, 7), (3, 7)), 2 * 3 * 5 * 7),
        ("window={size=8 pad=7_7 rhs_reversal=1}, ", "0bf_0oi->b0f", ((8, 4, 6), (8, 9, 6), (4, 15, 9)), 2 * 64 * 4 * 6 * 9),
        ("window={size=4 stride=3 pad=0_0 lhs_dilate=4}, ", "0bf_0io->0bf", ((4, 5, 6), (4, 6, 7), (4, 5, 7)), 2 * 4 * 5 * 6 * 7),
    ],
)
def test_products_as_tpus_have_them(window, labels, sizes, flops):
    left, right, out = (f"f32[{','.join(map(str, shape))}]{{0}}" for shape in sizes)
    text = f"""HloModule m

ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
    assert [one.flops for one in operations.of_module(hlo.parse(text))] == [flops]


RAGGED = """HloModule m

ENTRY %main (x: bf16[64,8], out: bf16[128,8], n: s32[4]) -> bf16[128,8] {
  %x = bf16[64,8] parameter(0)
  %out = bf16[128,8] parameter(1)
  %n = s32[4] parameter(2)
  ROOT %sent = bf16[128,8] ragged-all-to-all(%x, %out, %n, %n, %n, %n), replica_groups={{0,1,2,3}}
}
"""


@pytest.mark.parametrize("operands", ["%x, %out", "%out, %x"])
def test_rows_of_unequal_numbers_are_at_most_those_that_one_end_has_place_for(operands):
    (found,) = collectives.of_module(hlo.parse(RAGGED.replace("%x, %out", operands)), {"expert": 4})
    assert (found.kind, found.bytes, found.axes) == ("all-to-all", 2 * 64 * 8, ("expert",))


def test_a_permutation_in_which_the_first_keeps_its_own_is_one():
    text = "source_target_pairs={{0,0},{1,3},{3,1},{2,2}}, channel_id=3"
    assert collectives.members(text, 4) == [1, 3]
    assert collectives.members("source_target_pairs={{0,0},{1,1}}", 2) == [0, 0]


KERNELS = """HloModule m

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {
  %x = bf16[64,8] parameter(0)
  %attend.1 = bf16[64,8] custom-call(%x), custom_call_target="tpu_custom_call"
  %attend.12 = bf16[64,8] custom-call(%attend.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jvp(Decoder)/attention"}
  ROOT %ragged-dot-none = bf16[64,8] custom-call(%attend.12), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_have_the_names_that_they_were_given():
    done = operations.of_module(hlo.parse(KERNELS))
    assert operations.kernels(done) == ("attend", "ragged-dot-none")
    assert [one.label for one in done] == [
        "attend.1",
        "jvp(Decoder)/attention",
        "ragged-dot-none",
    ]  # notes of several lines before it


MASKED = """HloModule m

%rows (x: bf16[64,8], mask: pred[4,64]) -> bf16[4,64,8] {
  %x = bf16[64,8] parameter(0)
  ROOT %each = bf16[4,64,8] broadcast(%x), dimensions={1,2}
}

%gradient (x: bf16[64,8], y: bf16[64,8], mask: pred[4,64], other: pred[4,64]) -> bf16[4,8,8] {
  %x = bf16[64,8] parameter(0)
  %y = bf16[64,8] parameter(1)
  %mask = pred[4,64] parameter(2)
  %other = pred[4,64] parameter(3)
  %left = bf16[4,64,8] fusion(%x, %mask), kind=kLoop, calls=%rows
  %right = bf16[4,64,8] fusion(%y, %MASK), kind=kLoop, calls=%rows
  ROOT %c = bf16[4,8,8] convolution(%left, %right), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf
}

ENTRY %main (x: bf16[64,8], mask: pred[4,64], other: pred[4,64]) -> bf16[4,8,8] {
  %x = bf16[64,8] parameter(0)
  %mask = pred[4,64] parameter(1)
  %other = pred[4,64] parameter(2)
  ROOT %fusion.7 = bf16[4,8,8] fusion(%x, %x, %mask, %other), kind=kOutput, calls=%gradient
}
"""


@pytest.mark.parametrize("mask, flops, kernels", [("mask", 0.0, ("ragged-dot",)), ("other", 2 * 4 * 64 * 8 * 8, ())])
def test_products_of_rows_that_one_mask_chooses_are_those_of_experts(mask, flops, kernels):
    """As libtpu 0.0.42 writes the gradients of experts' matrices, without a label: it skips the rows of other experts."""
    done = operations.of_module(hlo.parse(MASKED.replace("MASK", mask)))
    assert (sum(one.flops for one in done), operations.kernels(done)) == (flops, kernels)
