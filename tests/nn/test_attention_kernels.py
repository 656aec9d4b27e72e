"""Kernels that run here against float64 NumPy, forward and gradient: masks × biases, with head ratios, dtypes, documents."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.nn.attention import Bias, Bidirectional, Causal, Chunked, Places, Prefix, SlidingWindow, attend
from llm_jax.nn.position import Alibi, T5Bias
from tests.nn.attention_reference import expected, seen
from tests.quick import QUICK

HEADS, SIZE, WIDTH = 4, 8, 6
MASKS = {
    "causal": Causal(),
    "bidirectional": Bidirectional(),
    "prefix": Prefix(),
    "window": SlidingWindow(3),
    "window with sinks": SlidingWindow(3, sinks=2),
    "window to both sides": SlidingWindow(3, causal=False),
    "chunked": Chunked(5),
}
BIASES = ("none", "alibi", "t5", "soft cap", "sinks")
T5 = T5Bias(buckets=8, max_distance=16)
# of the greatest entry of what is compared: f32 sums of some ten terms; bf16 has 8 bits, f16 11, and weights are rounded before V
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def inputs(seed, lengths, groups, dtype, size=SIZE, width=WIDTH):
    """q, k, v, cotangent, in float64 but exact in the dtype."""
    rng, (L, M) = np.random.default_rng(seed), lengths
    arrays = (rng.normal(size=s) for s in ((2, L, HEADS, size), (2, M, groups, size), (2, M, groups, width), (2, L, HEADS, width)))
    return [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays]


def documents(lengths):
    """Two documents and padding in the first row, one in the second."""
    return [np.array([[0] * 5 + [3] * (n - 7) + [-1] * 2, [1] * n], np.int32) for n in lengths]


def options(bias, rng):
    """(of `attend`, of the reference, how the gradient of the scores becomes that of the bias's parameters)."""
    if bias == "alibi":
        return {"bias": Bias(lambda params, a, b: Alibi().bias({}, a, b, HEADS))}, lambda q, k: Alibi().bias({}, q, k, HEADS)
    if bias == "t5":
        table = rng.normal(size=(8, HEADS)).astype(np.float32)
        hook = Bias(lambda table, a, b: T5.bias({"embedding": table}, a, b, HEADS), table)
        return {"bias": hook}, lambda q, k: table[T5.bucket(q[:, :, None] - k[:, None])].transpose(0, 3, 1, 2)
    if bias == "soft cap":
        return {"soft_cap": 1.5, "scale": 0.5}, None
    if bias == "sinks":
        return {"sinks_H": rng.normal(size=HEADS).astype(np.float32)}, None
    return {}, None


def results(given, mask, backend, dtype, queries, keys, extra):
    """(out, gradients of q, k, v, bias parameters and sinks), compiled without LLVM's optimizations, which outlast the run."""
    *arrays, g = (jnp.asarray(x, dtype) for x in given)

    def run(q, k, v, extra):
        out = attend(q, k, v, mask=mask, queries=queries, keys=keys, backend=backend, **extra)
        return (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(), out

    tunable = {name: extra[name] for name in ("bias", "sinks_H") if name in extra}
    rest = {name: value for name, value in extra.items() if name not in tunable}
    step = jax.jit(
        jax.grad(lambda q, k, v, tuned: run(q, k, v, rest | tuned), (0, 1, 2, 3), has_aux=True),
        compiler_options=QUICK,
    )
    (*grads, tuned), out = step(*arrays, tunable)
    return out, *grads, tuned


def compare(got, want, tolerance, what):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape, what
    np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-3), rtol=0, err_msg=what)


def check(mask, bias, backend, *, groups, dtype, lengths, divided, indexed, size=SIZE, width=WIDTH):
    rng = np.random.default_rng(BIASES.index(bias))
    given = inputs(1, lengths, groups, dtype, size, width)
    query_documents, key_documents = documents(lengths) if divided else (None, None)
    offsets = (2, 0) if indexed else (0, 0)  # places of their own: the queries start two tokens later
    places = [np.broadcast_to(np.arange(n) + o, (2, n)).astype(np.int32) for n, o in zip(lengths, offsets, strict=True)]
    prefix = places[1] < np.array([[4], [9]]) if isinstance(mask, Prefix) else None
    # the second document starts at place 5; splash counts chunks and first tokens by the row alone
    positions = None
    if divided and not (backend == "splash" and mask.counts):
        positions = [index - 5 * (d == 3) for index, d in zip(places, documents(lengths), strict=True)]
    queries = Places(places[0] if indexed else None, query_documents, None, positions and positions[0])
    same = lengths[0] == lengths[1] and not indexed and prefix is None
    keys = queries if same else Places(places[1] if indexed else None, key_documents, prefix, positions and positions[1])
    extra, added = options(bias, rng)
    out, *grads, tuned = results(given, mask, backend, dtype, queries, keys, extra)
    shown = seen(mask, *places, query_documents, key_documents, prefix, positions)
    want = expected(
        *given,
        shown,
        bias=0.0 if added is None else np.asarray(added(*places), np.float64),
        soft_cap=extra.get("soft_cap"),
        scale=extra.get("scale"),
        sinks=extra.get("sinks_H"),
    )
    tolerance = TOLERANCE[dtype]
    compare(out, want.out, tolerance, "out")
    for name, got in zip("qkv", grads, strict=True):
        compare(got, getattr(want, name), tolerance, f"d{name}")
    if bias == "t5":
        bucket = np.broadcast_to(T5.bucket(places[0][:, :, None] - places[1][:, None])[:, None], want.scores.shape)
        table, head = np.zeros((8, HEADS)), np.broadcast_to(np.arange(HEADS)[None, :, None, None], bucket.shape)
        np.add.at(table, (bucket, head), want.scores)
        compare(tuned["bias"].params, table, tolerance, "d table")
    if bias == "sinks":
        compare(tuned["sinks_H"], want.sinks, tolerance, "d sinks")
    lonely = ~shown.any(-1)
    assert (np.asarray(out)[lonely] == 0).all() and (np.asarray(grads[0])[lonely] == 0).all()
    return lonely.any()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=4, attention_block=4))


def choices(name, bias):
    """The rest of a case: it varies with mask and bias so that every pair of choices occurs."""
    mask, case = list(MASKS).index(name), list(MASKS).index(name) + BIASES.index(bias)
    lengths = ((11, 13), (13, 13), (13, 8))[(case + mask) % 3]
    return {"groups": (1, 2, 4)[case % 3], "lengths": lengths, "divided": case % 2 == 0, "indexed": case % 4 == 3}


def low(name, bias):
    """(back end, dtype) that the case is computed with in low precision."""
    mask, number = list(MASKS).index(name), BIASES.index(bias)
    backend = ("dense", "blockwise")[(number + mask // 2 + number // 2) % 2]
    return backend, ("bfloat16", "float16")[(number + mask // 2) % 2]


CASES, NAMES = list(itertools.product(MASKS, BIASES)), ("backend", "dtype")


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("name, bias", CASES)
def test_kernels_are_the_closed_form(name, bias, backend):
    check(MASKS[name], bias, backend, dtype="float32", **choices(name, bias))


@pytest.mark.parametrize(
    "name, bias", [pytest.param(*case, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, case in enumerate(CASES)]
)
def test_kernels_are_the_closed_form_in_low_precision(name, bias):
    backend, dtype = low(name, bias)
    check(MASKS[name], bias, backend, dtype=dtype, **choices(name, bias))


def test_every_choice_meets_both_low_precisions_and_both_back_ends():
    cases = [{"mask": case[0], "bias": case[1]} | choices(*case) | dict(zip(NAMES, low(*case), strict=True)) for case in CASES]
    for one, other in itertools.product(cases[0], NAMES):
        met = {(case[one], case[other]) for case in cases}
        assert one == other or len(met) == 2 * len({case[one] for case in cases}), (one, other)


@pytest.mark.parametrize(
    "name, bias, lengths, divided, dtype",
    [
        ("causal", "sinks", (200, 200), True, "float32"),
        ("bidirectional", "none", (130, 256), False, "float32"),
        ("window with sinks", "soft cap", (256, 256), False, "bfloat16"),
        ("window to both sides", "none", (140, 140), True, "float32"),
        ("chunked", "soft cap", (256, 256), True, "float32"),
        ("window", "none", (256, 256), False, "float32"),
        ("causal", "none", (128, 128), True, "float16"),
    ],
)
def test_interpreted_splash_is_the_closed_form(name, bias, lengths, divided, dtype):
    check(MASKS[name], bias, "splash", groups=2, dtype=dtype, lengths=lengths, divided=divided, indexed=False)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_rows_past_the_last_key_see_nothing(backend):
    assert check(SlidingWindow(3), "none", backend, groups=2, dtype="float32", lengths=(13, 6), divided=False, indexed=False)


SPLITS = {
    "rows and heads": ({"data": 2, "fsdp": 2, "tensor": 2}, Causal(), 128),
    "fewer keys than devices": ({"data": 1, "tensor": 4}, SlidingWindow(window=70), 128),
    "tokens, dealt out": ({"data": 1, "sequence": 2, "tensor": 2}, Causal(), 512),
    "tokens in order": ({"data": 1, "sequence": 2}, SlidingWindow(window=70), 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes, mask, length", SPLITS.values(), ids=SPLITS)
def test_splash_on_a_mesh_works_on_each_devices_rows_heads_and_tokens(axes, mask, length, monkeypatch):
    # of the reference, which is computed op by op: four rows at a time take it a minute
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=None))
    rng, rows = np.random.default_rng(3), 4 if axes["data"] > 1 else 1
    q, k, v = (jnp.asarray(rng.normal(size=(rows, length, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    documents = np.repeat([0, 1, -1], [length // 2 + 6, length // 2 - 14, 8])
    places = Places(segment=jnp.asarray(np.repeat([documents], rows, 0), jnp.int32))

    def summed(q, k, v, backend):
        out = attend(q, k, v, mask=mask, queries=places, keys=places, backend=backend, sinks_H=jnp.ones(4))
        return jnp.square(out).sum(), out

    differentiate = jax.grad(summed, argnums=(0, 1, 2), has_aux=True)
    wanted = differentiate(q, k, v, "dense")
    with jax.set_mesh(Mesh(**axes).build(jax.devices())):
        got = jax.jit(lambda *arrays: differentiate(*arrays, "splash"))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, wanted)


def test_splash_refuses_pieces_of_rows_that_fill_no_register():
    x = jnp.zeros((1, 128, 1, 8))
    sentence = "in pieces of a multiple of 128 tokens, got 128"
    with jax.set_mesh(Mesh(data=1, sequence=2).build()), pytest.raises(ConfigError, match=sentence):
        attend(x, x, x, backend="splash")


def test_splash_can_be_one_stage_of_several():
    x, stages = jax.ShapeDtypeStruct((2, 512, 2, 16), jnp.float32), jax.sharding.PartitionSpec("stage")
    staged = {"in_specs": stages, "out_specs": stages, "axis_names": {"stage"}, "check_vma": False}
    with jax.set_mesh(Mesh(data=1, stage=2, sequence=2, tensor=2).build()):
        assert jax.eval_shape(jax.shard_map(lambda x: attend(x, x, x, backend="splash"), **staged), x).shape == x.shape
