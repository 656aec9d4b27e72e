"""Which kernel is chosen, what each refuses and how it says so, and what cuDNN would be called with."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.nn import attention
from llm_jax.nn.attention import Bias, Bidirectional, Causal, Chunked, Mask, Places, Prefix, SlidingWindow, attend
from llm_jax.nn.kernels import cudnn
from llm_jax.nn.kernels.call import Call
from llm_jax.nn.position import Alibi
from tests.nn.attention_reference import expected, seen

ALIBI = Bias(lambda params, a, b: Alibi().bias({}, a, b, 4))


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU with cuDNN in this process."""
    monkeypatch.setattr(cudnn, "_missing", lambda: None)


def arrays(length=8, keys=None, heads=4, groups=2, size=8, width=8, dtype="bfloat16"):
    rng, keys = np.random.default_rng(0), length if keys is None else keys
    shapes = (2, length, heads, size), (2, keys, groups, size), (2, keys, groups, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
PLAIN, SEGMENTS = Places(), np.zeros((2, 8), np.int32)
IN_DOCUMENTS = Places(segment=jax.ShapeDtypeStruct((2, 8192), "int32"), position=jax.ShapeDtypeStruct((2, 8192), "int32"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "shapes, options, why",
    [
        ({}, {"sinks_H": np.zeros(4)}, "has no learned sinks"),
        ({}, {"soft_cap": 2.0}, "cannot cap scores"),
        ({}, {"rate": 0.1, "key": 0}, "takes no dropout"),
        ({"dtype": "float32"}, {}, "computes in bfloat16 or float16, and was given float32"),
        ({"width": 16}, {}, "needs values as wide as keys, got 16 and 8"),
        ({"size": 12, "width": 12}, {}, "multiple of 8 and at most 256 channels, got 12"),
        ({"size": 264, "width": 264}, {}, "at most 256 channels, got 264"),
        ({"length": 7}, {"bias": ALIBI}, "needs even lengths for this mask or bias, got 7"),
        ({}, {"scale": jnp.float32(0.3)}, "a scale that is a plain number"),
    ],
)
def test_cudnn_says_what_it_cannot_do(shapes, options, why):
    if "key" in options:
        options = options | {"key": jax.random.key(0)}
    with pytest.raises(ConfigError, match=why) as error:
        attend(*arrays(**shapes), **options, backend="cudnn")
    assert "use 'blockwise'" in str(error.value) and "\n" not in str(error.value)


def test_cudnn_needs_a_gpu():
    with pytest.raises(ConfigError, match="'cudnn' needs an NVIDIA GPU in this process, which runs on cpu"):
        attend(*arrays(), backend="cudnn")


@pytest.mark.parametrize(
    "lengths, options, why",
    [
        ((8, 8), {"bias": ALIBI}, "adds no bias to scores"),
        ((8, 8), {"rate": 0.1, "key": 0}, "has no dropout"),
        ((8, 8), {"queries": Places(np.arange(8)[None])}, "places must be counted from 0"),
        ((8, 8), {"mask": Prefix(), "keys": Places(prefix=np.ones((2, 8), bool))}, "prefixes come with the data"),
        ((8, 8), {"keys": Places(segment=SEGMENTS)}, "cannot tell which queries see nothing"),
        ((8, 8), {"mask": Chunked(4), "keys": Places(position=np.arange(8)[None])}, "counts places for Chunked in the row"),
        ((8, 4), {"mask": SlidingWindow(2)}, "queries past the last key undefined, got 8 queries and 4 keys"),
    ],
)
def test_splash_says_what_it_cannot_do(lengths, options, why):
    if "key" in options:
        options = options | {"key": jax.random.key(0)}
    with pytest.raises(ConfigError, match=why):
        attend(*arrays(*lengths), **options, backend="splash")


def test_an_unknown_back_end_lists_the_known():
    with pytest.raises(ConfigError, match="must be one of auto, dense, blockwise, cudnn, splash, got 'flash'"):
        attend(*arrays(), backend="flash")


@pytest.mark.parametrize("make", [lambda: SlidingWindow(0), lambda: SlidingWindow(3, sinks=-1), lambda: Chunked(0)])
def test_masks_check_their_numbers(make):
    with pytest.raises(ConfigError):
        make()


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────
def chosen(target, length, *, dtype="bfloat16", mask=attention.CAUSAL, bias=None, soft_cap=None, places=PLAIN):
    """Which kernel `auto` takes, without running it."""
    q, k, v = (jax.ShapeDtypeStruct((2, length, heads, 64), dtype) for heads in (4, 2, 2))
    with platform.targeting(target):
        kernel = attention._kernel("auto", Call(q, k, v, mask, places, places, bias, 0.125, soft_cap, None, 0.0, None))
    return [name for name, make in attention.KERNELS.items() if make() is kernel]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "target, length, options, name",
    [
        ("cpu", 512, {}, "dense"),
        ("cpu", 513, {}, "blockwise"),
        ("gpu", 128, {}, "cudnn"),
        ("gpu", 8192, {"mask": SlidingWindow(64)}, "cudnn"),
        ("gpu", 128, {"bias": ALIBI}, "cudnn"),
        ("gpu", 8192, {"bias": ALIBI}, "blockwise"),  # cuDNN would be handed an 8192 × 8192 bias
        ("gpu", 8192, {"mask": Chunked(64)}, "blockwise"),
        ("gpu", 8192, {"dtype": "float32"}, "blockwise"),
        ("gpu", 128, {"dtype": "float32"}, "dense"),
        ("tpu", 8192, {}, "splash"),
        ("tpu", 8192, {"mask": Chunked(64), "soft_cap": 30.0}, "splash"),
        ("tpu", 8192, {"places": IN_DOCUMENTS}, "splash"),
        ("tpu", 8192, {"places": IN_DOCUMENTS, "mask": Chunked(64)}, "blockwise"),  # its chunks are known when the program runs
        ("tpu", 8192, {"places": IN_DOCUMENTS, "mask": SlidingWindow(64, sinks=1)}, "blockwise"),
        ("tpu", 8192, {"bias": ALIBI}, "blockwise"),
        ("tpu", 128, {"bias": ALIBI}, "dense"),
    ],
)
def test_auto_chooses_by_platform_and_size(target, length, options, name):
    assert chosen(target, length, **options) == [name]


# ── cuDNN's arguments ────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class FirstHalf(Mask):
    """A user's own mask."""

    abstract = True  # no choice for configurations in other tests

    def visible(self, queries, keys):
        return (keys.index < 4)[:, None] & (queries.index >= 0)[:, :, None]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "mask, keys, divided, bias, named",
    [
        (Causal(), 8, False, None, True),
        (Causal(), 12, False, None, False),
        (Bidirectional(), 12, False, ALIBI, True),
        (SlidingWindow(3), 8, False, None, True),
        (SlidingWindow(3, sinks=1), 8, False, None, False),
        (SlidingWindow(3, causal=False), 8, False, ALIBI, False),
        (Chunked(4), 8, False, None, False),
        (Causal(), 8, True, ALIBI, False),
    ],
)
def test_cudnn_is_asked_for_the_same(monkeypatch, mask, keys, divided, bias, named):
    """The arguments it would get, given to JAX's own XLA implementation, are the closed form; and masks it knows are named."""
    calls, original = [], jax.nn.dot_product_attention

    def spy(*given, implementation, **options):
        assert implementation == "cudnn"
        calls.append(options)
        return original(*given, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    given = arrays(8, keys)
    documents = np.array([[0] * 3 + [1] * 3 + [-1] * 2, [1] * 8], np.int32) if divided else None
    places = Places(segment=documents)
    out, pull = jax.vjp(
        lambda *a: attend(*a, mask=mask, queries=places, keys=places, bias=bias, scale=0.4, backend="cudnn"), *given
    )
    (options,) = calls
    assert named == ("mask" not in options) and options["scale"] == 0.4
    if bias is not None:
        assert options["bias"].dtype == jnp.bfloat16
    g = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.bfloat16), np.float64)
    indices = [np.broadcast_to(np.arange(n), (2, n)) for n in (8, keys)]
    shown = seen(mask, *indices, documents, documents)
    added = 0.0 if bias is None else np.asarray(bias(*indices), np.float64)
    want = expected(*given, g, shown, bias=added, scale=0.4)
    assert (np.asarray(out)[~shown.any(-1)] == 0).all()
    for got, exact in zip((out, *pull(jnp.asarray(g, out.dtype))), (want.out, want.q, want.k, want.v), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=4e-2 * np.abs(exact).max())


def test_older_gpus_have_smaller_heads(monkeypatch, gpu):
    monkeypatch.setattr(cudnn, "_greatest_head", lambda: 128)
    with pytest.raises(ConfigError, match="at most 128 channels, got 256"):
        attend(*arrays(size=256, width=256), backend="cudnn")


@pytest.mark.parametrize(
    "mask, size, width, dtype",
    [(SlidingWindow(100, sinks=2), 64, 64, "bfloat16"), (Causal(), 192, 128, "bfloat16"), (Chunked(96), 80, 80, "float32")],
)
def test_splash_lowers_for_tpus(mask, size, width, dtype):
    """Forward, dq and dkv become TPU kernels, for a machine without one."""
    shapes = [jax.ShapeDtypeStruct((2, 256, h, n), dtype) for h, n in ((4, size), (2, size), (2, width))]
    places = Places(segment=np.zeros((2, 256), np.int32))

    def total(q, k, v, sinks):
        rest = {"mask": mask, "soft_cap": 30.0, "sinks_H": sinks, "queries": places, "keys": places}
        return attend(q, k, v, **rest).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    with platform.targeting("tpu"):
        exported = jax.export.export(step, platforms=["tpu"])(*shapes, jax.ShapeDtypeStruct((4,), "float32"))
    assert exported.mlir_module().count("tpu_custom_call") == 3


# ── one meaning for all ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_documents_of_one_side_hide_only_padding(backend):
    """An encoder's padding is hidden from a decoder that knows no documents, whatever the documents are numbered."""
    q, k, v = arrays(5, 8, dtype="float32")
    padded = Places(segment=np.array([[2] * 6 + [-1] * 2, [0] * 8], np.int32))
    out = attend(q, k, v, mask=Bidirectional(), keys=padded, backend=backend)
    short = attend(q[:1], k[:1, :6], v[:1, :6], mask=Bidirectional(), backend=backend)
    np.testing.assert_allclose(out[:1], short, atol=1e-5)
    np.testing.assert_allclose(out[1:], attend(q[1:], k[1:], v[1:], mask=Bidirectional(), backend=backend), atol=1e-5)
    out = attend(q, k, v, mask=Bidirectional(), queries=Places(segment=np.array([[0] * 4 + [-1], [0] * 5])), backend=backend)
    assert (np.asarray(out)[0, 4] == 0).all() and (np.asarray(out)[0, 3] != 0).any()


@pytest.mark.parametrize("block", [3, None])
def test_a_mask_of_ones_own_works_everywhere(monkeypatch, block):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=block, attention_block=block or 128))
    q, k, v = arrays(dtype="float32")
    want = attend(q, k[:, :4], v[:, :4], mask=Bidirectional(), backend="dense")
    for backend in ("dense", "blockwise", "splash"):
        np.testing.assert_allclose(attend(q, k, v, mask=FirstHalf(), backend=backend), want, atol=1e-5)
