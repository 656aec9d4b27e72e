"""Latent attention and the LSTM against their papers' equations in float64, and latent attention's two forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from llm_jax.core.sharding import unbox
from llm_jax.nn.attention import Causal, Places
from llm_jax.nn.context import Context
from llm_jax.nn.latent import MLA, absorbed, expanded
from llm_jax.nn.position import NoPosition, Rope
from llm_jax.nn.recurrent import LSTM

RNG = np.random.default_rng(0)
B, L, D = 2, 7, 12
NO_POSITION = NoPosition()
X = RNG.normal(size=(B, L, D)).astype(np.float32)


def built(mixer, position=NO_POSITION):
    module = mixer.build(position, 1.0, jnp.float32, "mixer")
    start = unbox(module.init(jax.random.key(0), X, Context(Places())))["params"]
    return module, jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), start)


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# ── latent attention ─────────────────────────────────────────────────────────────────────────────────────────────────
SMALL = MLA(heads=3, kv_rank=5, q_rank=6, nope_dim=4, rope_dim=2, value_dim=3)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x_BLHK):
    half = x_BLHK.shape[-1] // 2
    angle = np.arange(L)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x_BLHK[..., :half], x_BLHK[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


@pytest.mark.parametrize("q_rank", [None, 6])
def test_latent_attention_is_the_papers(q_rank):
    """DeepSeek-V2 2024, eq. 9-19."""
    from dataclasses import replace

    config = replace(SMALL, q_rank=q_rank)
    module, params = built(config, Rope())
    p, x = f64(params), X.astype(np.float64)
    if q_rank:
        q = np.einsum("blc,chk->blhk", rms(x @ p["query_down"]["kernel"], p["query_norm"]["scale"]), p["query_up"]["kernel"])
    else:
        q = np.einsum("bld,dhk->blhk", x, p["query"]["kernel"])
    down = x @ p["kv_down"]["kernel"]
    latent = rms(down[..., :5], p["kv_norm"]["scale"])
    up = np.einsum("blc,chk->blhk", latent, p["kv_up"]["kernel"])
    k_rope = turned(down[..., None, 5:])
    scores = np.einsum("blhk,bmhk->bhlm", q[..., :4], up[..., :4]) + np.einsum("blhk,bmxk->bhlm", turned(q[..., 4:]), k_rope)
    scores = np.where(np.tri(L, dtype=bool), scores / np.sqrt(6), -np.inf)
    out = np.einsum("bhlm,bmhv->blhv", special.softmax(scores, -1), up[..., 4:])
    expected = np.einsum("blhv,hvd->bld", out, p["output"]["kernel"])
    np.testing.assert_allclose(module.apply({"params": params}, X, Context(Places())), expected, atol=3e-6)


def test_absorbed_matrices_change_nothing():
    shapes = (B, L, 3, 4), (B, L, 3, 2), (B, L, 5), (B, L, 2), (5, 3, 4), (5, 3, 3)
    arrays = [RNG.normal(size=shape).astype(np.float32) for shape in shapes]
    given = {"mask": Causal(), "scale": 6**-0.5}
    np.testing.assert_allclose(absorbed(*arrays, **given), expanded(*arrays, **given), atol=1e-5)


def test_the_cache_holds_the_latent_vector_alone():
    module, params = built(SMALL, Rope())
    whole = module.apply({"params": params}, X, Context(Places()))
    cache, pieces = {}, []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        context = Context(Places(jnp.arange(start, stop)[None]), slots=L)
        out, kept = module.apply({"params": params} | cache, X[:, start:stop], context, mutable=["cache"])
        cache = {"cache": kept["cache"]}
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == B * L * SMALL.cached(D) == B * L * (5 + 2)


# ── LSTM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def recurrence(p, x_LD, starts=(0,)):
    """The equations, one row and one step at a time."""
    units = p["recurrent"]["kernel"].shape[0]
    outputs = []
    for t, x in enumerate(x_LD):
        if t in starts:
            c = h = np.zeros(units)
        gates = np.einsum("d,dgu->gu", x, p["input"]["kernel"]) + np.einsum("v,vgu->gu", h, p["recurrent"]["kernel"]) + p["bias"]
        i, f, o, z = gates
        c = special.expit(f) * c + special.expit(i) * np.tanh(z)
        h = special.expit(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("units", [None, 5])
def test_the_lstm_is_its_equations(units):
    module, params = built(LSTM(units=units))
    p = f64(params)
    expected = np.stack([recurrence(p, row) for row in X.astype(np.float64)])
    if units:
        expected = expected @ p["projection"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": params}, X, Context(Places())), expected, atol=2e-6)


def test_the_lstm_forgets_between_documents_and_passes_over_padding():
    module, params = built(LSTM())
    p, row = f64(params), X[0].astype(np.float64)
    segments = np.array([[0, 0, 0, 1, 1, -1, 1], [0] * 7], np.int32)
    out = module.apply({"params": params}, X, Context(Places(segment=jnp.asarray(segments))))
    np.testing.assert_allclose(out[0, :5], recurrence(p, row[:5], starts=(0, 3)), atol=2e-6)
    np.testing.assert_allclose(out[1], recurrence(p, X[1].astype(np.float64)), atol=2e-6)


def test_padding_inside_a_document_interrupts_no_lstm():
    module, params = built(LSTM())
    segments = np.array([[-1, 0, 0, -1, 0, 1, 1], [0, -1, 1, -1, -1, 1, 0]], np.int32)
    out = module.apply({"params": params}, X, Context(Places(segment=jnp.asarray(segments))))
    for row, real, starts in ((0, [1, 2, 4, 5, 6], (0, 3)), (1, [0, 2, 5, 6], (0, 1, 3))):
        expected = recurrence(f64(params), X[row, real].astype(np.float64), starts=starts)
        np.testing.assert_allclose(out[row, real], expected, atol=2e-6)


def test_an_lstm_goes_on_from_its_state():
    module, params = built(LSTM(units=5))
    whole = module.apply({"params": params}, X, Context(Places()))
    first, kept = module.apply({"params": params}, X[:, :3], Context(Places(), slots=L), mutable=["cache"])
    rest, _ = module.apply({"params": params} | kept, X[:, 3:], Context(Places(), slots=L), mutable=["cache"])
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=1e-6)


def test_the_forget_gate_starts_open():
    module = LSTM(forget=2.0).build(NoPosition(), 1.0, jnp.float32, "mixer")
    bias = unbox(module.init(jax.random.key(0), X, Context(Places())))["params"]["bias"]
    np.testing.assert_array_equal(bias, [[0.0] * D, [2.0] * D, [0.0] * D, [0.0] * D])


@pytest.mark.parametrize("mixer", [SMALL, LSTM(units=5)], ids=lambda m: type(m).__name__)
def test_gradients(mixer):
    module, params = built(mixer)
    check_grads(lambda p, x: module.apply({"params": p}, x, Context(Places())).sum(), (params, X), 1, ["rev"], atol=2e-2, rtol=2e-2)
