"""Attention by blocks: its VJP, Hessian-vector products, dropout, what it skips, what it keeps, and that it composes."""

import itertools
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from llm_jax.core import platform
from llm_jax.core.sharding import constrain
from llm_jax.nn.attention import Bias, Bidirectional, Causal, Chunked, Places, SlidingWindow, attend
from llm_jax.nn.kernels import blockwise
from tests.nn.attention_reference import expected
from tests.quick import QUICK

AXES = "heads_act", "kv_heads_act", "kv_heads_act"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=4, attention_block=4))


def arrays(length=9, heads=4, groups=2, rows=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (rows, length, heads, 4), (rows, length, groups, 4), (rows, length, groups, 3)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def near(table, queries, keys):
    """A learned bias by distance."""
    distance = jnp.clip(jnp.abs(queries[:, :, None] - keys[:, None]), 0, 3)
    return jnp.moveaxis(table[distance], -1, 1)


def everything(q, k, v, table, sinks, backend="blockwise", **options):
    """Window with sinks, documents with padding, learned bias, cap and sinks."""
    places = Places(segment=jnp.asarray([[0] * 4 + [1] * 5, [2] * 7 + [-1] * 2], jnp.int32))
    options = {"mask": SlidingWindow(6, sinks=1), "soft_cap": 2.0, "bias": Bias(near, table), "sinks_H": sinks} | options
    return attend(q, k, v, queries=places, keys=places, backend=backend, **options)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_vjp_is_the_derivative(rate):
    """By finite differences in float64. With dropout: of the same weights in both passes, or the derivative is another's."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        given = (*arrays(dtype=np.float64), rng.normal(size=(4, 4)), rng.normal(size=4))
        run = jax.jit(lambda *given: everything(*given, rate=rate, key=jax.random.key(0)))
        check_grads(run, given, order=1, modes=["rev"])


@pytest.mark.usefixtures("small_blocks")
def test_hessian_vector_products_are_denses():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        given = (*arrays(dtype=np.float64), rng.normal(size=(4, 4)), rng.normal(size=4))
        direction = tuple(rng.normal(size=x.shape) for x in given)

        def product(backend):
            def loss(given):
                return (everything(*given, backend=backend) ** 2).sum()

            return jax.jit(lambda x, d: jax.jvp(jax.grad(loss), (x,), (d,))[1], compiler_options=QUICK)(given, direction)

        for got, want in zip(product("blockwise"), product("dense"), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())  # dense softmax is float32


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_no_gradient_comes_from_later_tokens(backend):
    given = arrays()
    step = jax.grad(lambda *given: attend(*given, backend=backend)[:, 5].sum(), (0, 1, 2))
    grads = jax.jit(step, compiler_options=QUICK)(*given)
    for grad in grads:
        assert (np.asarray(grad)[:, 6:] == 0).all()
    for grad in grads[1:]:
        assert (np.abs(np.asarray(grad)[:, :6]).sum((0, 2, 3)) > 0).all()


@pytest.mark.usefixtures("small_blocks")
def test_dropout_keeps_the_mean():
    q, k, _ = arrays()
    ones = np.ones((2, 9, 2, 1), np.float32)

    def total(key):  # of the weights of a query
        return attend(q, k, ones, rate=0.3, key=key, backend="blockwise")[..., 0]

    totals = jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(totals.mean(0), 1, atol=5 * 0.66 / np.sqrt(2000))  # one key: deviation √(0.3 / 0.7)
    first = totals[:, 0, 0]  # the first query has one key: dropped whole, or 1 / 0.7
    assert set(np.round(np.unique(first), 4)) == {0.0, np.float32(1.4286)}
    assert len({tuple(np.round(row, 4)) for row in np.asarray(totals[:, 0, 0].reshape(-1, 20))}) > 90  # heads and keys differ


def test_equal_blocks_drop_differently(monkeypatch):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_block=8))
    q, k, eye = (
        np.zeros((1, 16, 1, 4), np.float32),
        np.zeros((1, 16, 1, 4), np.float32),
        np.eye(16, dtype=np.float32)[None, :, None],
    )
    weights = attend(q, k, eye, mask=Bidirectional(), rate=0.5, key=jax.random.key(0), backend="blockwise")[0, :, 0] > 0
    quarters = [np.asarray(weights)[a : a + 8, b : b + 8] for a in (0, 8) for b in (0, 8)]
    for i, one in enumerate(quarters):
        assert 0.25 < one.mean() < 0.75 and all((one != other).any() for other in quarters[i + 1 :])


# ── what is skipped ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "mask, met",
    [
        (Causal(), [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (SlidingWindow(4), [[0], [0, 1], [1, 2], [2, 3]]),
        (SlidingWindow(4, sinks=2), [[0], [0, 1], [0, 1, 2], [0, 2, 3]]),
        (SlidingWindow(1, causal=False), [[0], [1], [2], [3]]),
        (Chunked(8), [[0], [0, 1], [2], [2, 3]]),
        (Bidirectional(), [[0, 1, 2, 3]] * 4),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_hidden_blocks_are_not_visited(mask, met, indexed):
    """A NaN among the values of a block that is visited would spread, whatever its weight."""
    q, k, v = arrays(length=16)
    places = Places(jnp.arange(16)[None]) if indexed else None
    run = jax.jit(lambda v: attend(q, k, v, mask=mask, queries=places, keys=places, backend="blockwise"), compiler_options=QUICK)
    for block in range(4):
        spoiled = v.copy()
        spoiled[:, 4 * block : 4 * block + 4] = np.nan
        nan = np.isnan(run(spoiled)).reshape(2, 4, 4, -1)
        assert [bool(nan[:, i].any()) for i in range(4)] == [block in blocks for blocks in met]


@pytest.mark.usefixtures("small_blocks")
def test_keys_at_scattered_places_are_found():
    """A ring buffer: keys in another order give the same, and blocks are still chosen by place."""
    q, k, v = arrays(length=16)
    order = np.roll(np.arange(16), 6)
    straight = attend(q, k, v, mask=SlidingWindow(5), backend="dense")
    rolled = attend(q, k[:, order], v[:, order], mask=SlidingWindow(5), keys=Places(jnp.asarray(order)[None]), backend="blockwise")
    np.testing.assert_allclose(rolled, straight, atol=1e-5)


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(1024)])
def test_memory_is_linear_in_length(mask):
    """Temporaries of the gradient, as the compiler counts them; scores written out would take 4 GiB for a head at 32k."""

    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), "float32") for heads in (8, 2, 2)]
        step = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, mask=mask, backend="blockwise").sum(), (0, 1, 2)))
        return step.lower(*shapes).compile(QUICK).memory_analysis().temp_size_in_bytes

    sizes = [temporaries(length) for length in (8192, 16384, 32768)]
    for small, large in itertools.pairwise(sizes):
        assert large <= 2.1 * small
    assert sizes[-1] < 0.75 * 2**30


LONG = """
import sys
import jax, jax.numpy as jnp, numpy as np
from llm_jax.nn.attention import attend
given = np.load(sys.argv[1])
q, k, v, g = (jnp.asarray(given[name]) for name in "qkvg")
out, pull = jax.vjp(jax.jit(lambda q, k, v: attend(q, k, v, backend="blockwise")), q, k, v)
dq, dk, dv = pull(g)
np.savez(sys.argv[2], out=out[:, given["rows"]], dq=dq[:, given["rows"]], dk=dk, dv=dv)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_32k_tokens_take_2_gib_and_are_the_closed_form(tmp_path):
    """Forward and gradient in a process of its own, whose peak is its own too; scores of one head alone would take 4 GiB.

    Only some results have a cotangent, one in each of 64 blocks of queries, so that every gradient is a short float64 sum.
    """
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("the peak is read from Linux's /proc")
    length, rng = 32768, np.random.default_rng(0)
    rows = np.arange(0, length, 512) + rng.integers(0, 512, 64)
    q, k, v, g = (rng.normal(size=(1, length, heads, 64)).astype(np.float32) for heads in (8, 2, 2, 8))
    g = g * np.isin(np.arange(length), rows)[None, :, None, None]
    np.savez(tmp_path / "given.npz", q=q, k=k, v=v, g=g, rows=rows)
    command = [sys.executable, "-c", LONG, str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"XLA_FLAGS": ""})
    assert int(done.stdout) < 2 * 2**20, f"{done.stdout} KiB"
    found = np.load(tmp_path / "found.npz")
    shown = (np.arange(length)[None] <= rows[:, None])[None]
    want = expected(q[:, rows], k, v, g[:, rows], shown)
    for name, wanted in (("out", want.out), ("dq", want.q), ("dk", want.k), ("dv", want.v)):
        np.testing.assert_allclose(found[name], wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)


# ── composition ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("small_blocks")
def test_a_population_is_its_members():
    given = [np.stack([x, 2 * x, -x]) for x in arrays()]
    rates, keys = jnp.asarray([0.0, 0.2, 0.5]), jax.random.split(jax.random.key(0), 3)
    step = jax.grad(
        lambda q, k, v, rate, key: (attend(q, k, v, rate=rate, key=key, backend="blockwise") ** 2).sum(), argnums=(0, 1, 2)
    )
    together = jax.jit(jax.vmap(step), compiler_options=QUICK)(*given, rates, keys)
    one = jax.jit(step, compiler_options=QUICK)
    for index in range(3):
        alone = one(*(x[index] for x in given), rates[index], keys[index])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[index], b, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_mesh_gives_the_same():
    given = arrays(rows=4)

    def step(q, k, v):
        q, k, v = (constrain(x, "batch", "length", axis, None) for x, axis in zip((q, k, v), AXES, strict=True))
        return (attend(q, k, v, backend="blockwise") ** 2).sum()

    alone = jax.jit(jax.grad(step, (0, 1, 2)), compiler_options=QUICK)(*given)
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        spec = jax.NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        split = jax.jit(jax.grad(step, (0, 1, 2)), compiler_options=QUICK)(*(jax.device_put(x, spec) for x in given))
    for a, b in zip(split, alone, strict=True):
        assert not a.sharding.is_fully_replicated
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_are_of_equal_length():
    size = platform.CPU.attention_block
    assert [blockwise.block(n) for n in (1, size, size + 1, 2 * size + 1)] == [1, size, size // 2 + 1, (2 * size + 3) // 3]
