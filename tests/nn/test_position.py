"""Positional schemes: one contract for all, the papers' formulas written a second time and plainly, and transformers' numbers."""

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llm_jax.core.config import ConfigError, components, from_json, to_json
from llm_jax.core.sharding import unbox
from llm_jax.core.written import parse
from llm_jax.nn import position
from llm_jax.nn.position import Alibi, Learned, NoPosition, Position, Positions, Rope, Sinusoidal, T5Bias
from llm_jax.nn.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    Scaling,
    YarnScaling,
    angles,
    inverse_frequencies,
)
from tests.golden import make_positions
from tests.quick import QUICK

RNG = np.random.default_rng(0)
HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE


# ── the contract ─────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    """A scheme and what it claims. distances: scores depend on differences of places alone. alone: so does what happens to a
    token on its own place, whatever else is in the sequence."""

    scheme: Position
    distances: bool = True
    alone: bool = True

    def __str__(self):
        return str(self.scheme)


ROWS = [
    Row(NoPosition()),
    Row(Sinusoidal(), distances=False),
    Row(Sinusoidal(interleaved=False), distances=False),
    Row(Learned(), distances=False),
    Row(Learned(offset=2), distances=False),
    Row(Rope()),
    Row(Rope(fraction=0.5)),
    Row(Rope(scaling=LinearScaling())),
    Row(Rope(scaling=NtkScaling())),
    Row(Rope(scaling=DynamicScaling(original_length=8)), distances=False, alone=False),
    Row(Rope(scaling=YarnScaling())),
    Row(Rope(scaling=Llama3Scaling(), fraction=0.5)),
    Row(Alibi()),
    Row(T5Bias()),
    Row(T5Bias(buckets=8, max_distance=20, bidirectional=True)),
]
INDEX = np.array([[0, 1, 2, 5, 17], [3, 2, 9, 0, 1]], np.int32)
X = RNG.normal(size=(2, 5, WIDTH)).astype(np.float32)


def parameters(scheme: Position):
    """A scheme's parameters, away from where they start."""
    params = unbox(Positions(scheme).init(jax.random.key(0), X, INDEX, unit=1.0, heads=HEADS)).get("params", {})
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def embedded(scheme: Position, params, x_BLD, index_BL):
    return Positions(scheme).apply({"params": params}, x_BLD, index_BL, unit=1.0, heads=HEADS)


def scores(scheme: Position, params, x_BLD, index_BL):
    """What a layer without weights computes: embeddings against their mirror image, every hook at work; `[B, H, L, M]`."""
    x_BLD, shared = embedded(scheme, params, x_BLD, index_BL)
    q_BLHK = x_BLD.reshape(*x_BLD.shape[:2], HEADS, SIZE)
    q_BLHK, k_BMHK = (scheme.rotate(x, index_BL) for x in (q_BLHK, q_BLHK[..., ::-1]))
    s_BHLM = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BMHK) / math.sqrt(SIZE)
    bias = scheme.bias(shared, index_BL, index_BL, HEADS)
    return s_BHLM if bias is None else s_BHLM + bias


def no_token_sees_a_later_one(row: Row):
    def attended(x_LD):
        s_HLM = scores(row.scheme, params, x_LD[None], INDEX[:1])[0]
        p_HLM = jax.nn.softmax(jnp.where(np.tri(len(x_LD), dtype=bool)[None], s_HLM, -jnp.inf))
        return jnp.einsum("hlm,md->ld", p_HLM, embedded(row.scheme, params, x_LD[None], INDEX[:1])[0][0])

    params = parameters(row.scheme)
    seen_LM = np.abs(jax.jit(jax.jacrev(attended))(X[0])).sum((1, 3))
    np.testing.assert_array_equal(seen_LM > 0, np.tri(len(seen_LM), dtype=bool))


def parameters_are_counted_and_all_of_use(row: Row):
    params = parameters(row.scheme)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == row.scheme.parameters(WIDTH, HEADS)
    value, gradient = jax.jit(jax.value_and_grad(lambda p, x: jnp.square(scores(row.scheme, p, x, INDEX)).sum(), (0, 1)))(params, X)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and leaf.any()


def scores_depend_on_distances_alone(row: Row):
    params = parameters(row.scheme)
    call = jax.jit(lambda index: scores(row.scheme, params, X, index))
    if row.distances:
        np.testing.assert_allclose(call(INDEX + 100_000), call(INDEX), atol=2e-5)
    else:
        assert np.abs(call(INDEX + 100) - call(INDEX)).max() > 1e-2, "it could claim distances=True"


def blocks_of_rows_equal_the_whole(row: Row):
    params, block = parameters(row.scheme), slice(2, 4)
    x_BLD, shared = embedded(row.scheme, params, X, INDEX)
    x_BLHK = x_BLD.reshape(2, -1, HEADS, SIZE)
    bias, rows = (row.scheme.bias(shared, INDEX[:, of], INDEX, HEADS) for of in (slice(None), block))
    if bias is not None:
        assert bias.dtype == jnp.float32 and bias.shape == (2, HEADS, 5, 5)
        np.testing.assert_allclose(rows, bias[:, :, block], rtol=1e-6)
    if row.alone:
        np.testing.assert_allclose(embedded(row.scheme, params, X[:, block], INDEX[:, block])[0], x_BLD[:, block], rtol=1e-6)
        np.testing.assert_allclose(
            row.scheme.rotate(x_BLHK[:, block], INDEX[:, block]), row.scheme.rotate(x_BLHK, INDEX)[:, block], rtol=1e-6
        )


def sequences_of_a_batch_are_as_if_alone(row: Row):
    params = parameters(row.scheme)
    together = scores(row.scheme, params, X, INDEX)
    for b in range(2):
        one = slice(b, b + 1)
        np.testing.assert_allclose(together[one], scores(row.scheme, params, X[one], INDEX[one]), atol=1e-5)
    shared = scores(row.scheme, params, X, INDEX[:1])  # one index for all
    np.testing.assert_allclose(shared, scores(row.scheme, params, X, INDEX[[0, 0]]), atol=1e-5)


CONTRACT: list[Callable[[Row], None]] = [
    no_token_sees_a_later_one,
    parameters_are_counted_and_all_of_use,
    scores_depend_on_distances_alone,
    blocks_of_rows_equal_the_whole,
    sequences_of_a_batch_are_as_if_alone,
]


@pytest.mark.parametrize("clause", CONTRACT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_scheme_keeps_the_contract(row, clause):
    clause(row)


@pytest.mark.parametrize(
    "base, present", [(Position, [row.scheme for row in ROWS]), (Scaling, [getattr(row.scheme, "scaling", None) for row in ROWS])]
)
def test_every_scheme_has_a_row(base, present):
    ours = {cls for cls in components(base).values() if cls.__module__.startswith("llm_jax.")}
    assert ours == {type(component) for component in present if component is not None}


def test_schemes_are_read_from_flags_and_files():
    for row in ROWS:
        assert parse(str(row.scheme), Position, "model.position") == row.scheme
        assert from_json(to_json(row.scheme), Position) == row.scheme


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("width", [6, 7])
def test_sinusoidal_is_the_papers_table(width):
    positions = np.array([[0, 1, 5, 100_000]])
    got = Sinusoidal().embed(jnp.zeros((1, 4, width)), positions, unit=1.0, param=None)
    for column, p in enumerate(positions[0]):
        for i in range(width):
            angle = p / 10_000 ** (2 * (i // 2) / width)
            assert abs(float(got[0, column, i]) - (math.cos(angle) if i % 2 else math.sin(angle))) < 1e-5


def test_sinusoidal_in_halves_is_whispers_table():
    scheme, golden = Sinusoidal(interleaved=False), np.array(make_positions.stored("sinusoids")["table"])
    places = np.arange(20)[None]
    np.testing.assert_allclose(scheme.embed(jnp.zeros((1, 20, 10)), places, unit=1.0, param=None)[0], golden, atol=3e-6)
    odd = scheme.embed(jnp.zeros((1, 20, 11)), places, unit=2.0, param=None)[0]
    np.testing.assert_allclose(odd, 2 * np.pad(golden, [(0, 0), (0, 1)]), atol=6e-6)


def test_learned_rows_start_after_the_offset():
    scheme, table = Learned(max_length=5, offset=2), RNG.normal(size=(7, WIDTH)).astype(np.float32)
    got, _ = embedded(scheme, {"embedding": table}, X[:, :3], np.array([[0, 4, 1]]))
    np.testing.assert_allclose(got, X[:, :3] + table[[2, 6, 3]][None], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"model\.position\.max_length must be at least the sequence length 6, got 5"):
        embedded(scheme, {"embedding": table}, np.zeros((1, 6, WIDTH)), np.arange(6)[None])


# ── rotations ────────────────────────────────────────────────────────────────────────────────────────────────────────
def ntk(theta, size, i, factor):
    return (theta * factor ** (size / (size - 2))) ** (-2 * i / size)


def yarn(theta, size, i):
    """s = 4, 4,096 places, ramp from 32 to 1 turns, rounded outwards."""
    pair = [size * math.log(4096 / turns / (2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)]
    low, high = max(math.floor(pair[0]), 0), min(math.ceil(pair[1]), size - 1)
    slowed = min(max((i - low) / (high - low), 0), 1)
    return theta ** (-2 * i / size) * (1 - slowed + slowed / 4)


def llama3(theta, size, i):
    frequency = theta ** (-2 * i / size)
    length = 2 * math.pi / frequency
    if length > 8192 / 1:
        return frequency / 8
    if length < 8192 / 4:
        return frequency
    smooth = (8192 / length - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


FREQUENCIES = [  # scaling, radians per place of the pair i, amplitude
    (None, lambda theta, size, i: theta ** (-2 * i / size), 1.0),
    (LinearScaling(), lambda theta, size, i: theta ** (-2 * i / size) / 4, 1.0),
    (NtkScaling(), lambda theta, size, i: ntk(theta, size, i, 4), 1.0),
    (DynamicScaling(original_length=16), lambda theta, size, i: ntk(theta, size, i, 4 * 41 / 16 - 3), 1.0),
    (DynamicScaling(original_length=41), lambda theta, size, i: ntk(theta, size, i, 1), 1.0),
    (YarnScaling(), yarn, 0.1 * math.log(4) + 1),
    (Llama3Scaling(), llama3, 1.0),
]


@pytest.mark.parametrize("scaling, frequency, amplitude", FREQUENCIES, ids=lambda c: "" if callable(c) else str(c))
@pytest.mark.parametrize("fraction, turned", [(1.0, 16), (0.5, 8), (0.45, 6), (0.125, 2)])
def test_rope_turns_pairs(scaling, frequency, amplitude, fraction, turned):
    scheme, places, theta = Rope(fraction=fraction, scaling=scaling, theta=700.0), [0, 3, 40], 700.0
    if isinstance(scaling, NtkScaling | DynamicScaling) and turned == 2:
        frequency = lambda theta, size, i: 1.0  # noqa: E731  a single pair is the fastest: it is kept
    x = RNG.normal(size=(1, 3, 1, 16)).astype(np.float32)
    expected = x.astype(np.float64)
    for at, place in enumerate(places):
        for i in range(turned // 2):
            pair = complex(x[0, at, 0, i], x[0, at, 0, i + turned // 2])
            pair *= amplitude * cmath.exp(1j * place * frequency(theta, turned, i))
            expected[0, at, 0, i], expected[0, at, 0, i + turned // 2] = pair.real, pair.imag
    np.testing.assert_allclose(scheme.rotate(x, np.array([places])), expected, atol=1e-5)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_angles_are_as_exact_at_any_index(theta):
    places = np.concatenate([np.arange(131_000, 131_072), [2**24 + 1, 2**31 - 1, -1, -100_000]])
    frequencies = inverse_frequencies(theta, 128)
    got = angles(places.astype(np.int32)[None], frequencies)[0]
    np.testing.assert_allclose(np.cos(got), np.cos(places[:, None] * frequencies), atol=5e-7)


def test_dynamic_scaling_needs_no_compilation_of_its_own_for_a_length():
    traced = []
    scheme = Rope(scaling=DynamicScaling(original_length=50))

    @jax.jit
    def call(index):
        traced.append(index)
        return scheme.rotate(X.reshape(2, 5, HEADS, SIZE), index)

    inside, beyond = call(INDEX), call(np.where(INDEX == 17, 60, INDEX))
    np.testing.assert_allclose(inside, Rope().rotate(X.reshape(2, 5, HEADS, SIZE), INDEX), atol=1e-5)
    assert len(traced) == 1
    assert np.abs(beyond[0] - inside[0])[:4].max() > 1e-3 and not np.abs(beyond[1] - inside[1]).any(), "each row has its own length"


ROPES: dict[str, Rope] = {  # as transformers' cases of the same names
    "linear": Rope(scaling=LinearScaling(factor=8.0)),
    "linear, a quarter": Rope(scaling=LinearScaling(factor=8.0), fraction=0.25),
    "dynamic, short": Rope(scaling=DynamicScaling(factor=2.0)),
    "dynamic, long": Rope(scaling=DynamicScaling(factor=2.0)),
    "dynamic, long, half": Rope(scaling=DynamicScaling(factor=4.0), fraction=0.5),
    "ntk": Rope(scaling=NtkScaling(factor=2.0)),
    "yarn": Rope(scaling=YarnScaling()),
    "yarn, half": Rope(scaling=YarnScaling(), fraction=0.5),
    "yarn, gpt-oss": Rope(theta=150_000.0, scaling=YarnScaling(factor=32.0, truncate=False)),
    "yarn, DeepSeek-V2": Rope(scaling=YarnScaling(factor=40.0, mscale=0.707, mscale_all_dim=1.1)),
    "yarn, given amplitude": Rope(scaling=YarnScaling(attention_factor=0.8, beta_fast=16.0, beta_slow=2.0)),
    "yarn, no ramp": Rope(scaling=YarnScaling(original_length=6)),
    "llama3.1": Rope(theta=500_000.0, scaling=Llama3Scaling()),
    "llama3, half": Rope(scaling=Llama3Scaling(factor=32.0, original_length=256), fraction=0.5),
}


@pytest.mark.parametrize("name", make_positions.SCALINGS)
def test_scalings_are_transformers(name):
    rope, golden = ROPES[name], make_positions.stored("scalings")[name]
    last = make_positions.SCALINGS[name].get("length", 1) - 1
    got = rope.scaling.frequencies(rope.theta, int(make_positions.HEAD * rope.fraction), np.array([[last]]))
    np.testing.assert_allclose(np.ravel(got), golden["frequencies"], rtol=2e-6)
    np.testing.assert_allclose(rope.scaling.amplitude, golden["amplitude"], rtol=1e-6)
    np.testing.assert_allclose(rope.score_factor, golden["score_factor"], rtol=1e-6)


def test_partial_rotation_is_gpt_neoxs():
    golden = make_positions.stored("neox")
    got = Rope(fraction=0.25).rotate(make_positions.waves(2, 3, 2, 16), np.array(golden["places"]))
    np.testing.assert_allclose(got, golden["turned"], atol=1e-4)  # at place 700 theirs is off by 5e-5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearScaling(factor=0.5), r"factor must be >= 1, got 0\.5"),
        (lambda: DynamicScaling(original_length=0), r"original_length must be > 0, got 0"),
        (lambda: YarnScaling(beta_fast=1.0), r"beta_fast must be > beta_slow = 1\.0, got 1\.0"),
        (lambda: YarnScaling(mscale=0.7), r"mscale needs mscale_all_dim"),
        (lambda: Llama3Scaling(high_frequency=0.5), r"high_frequency must be > low_frequency = 1\.0, got 0\.5"),
        (lambda: Rope(theta=1.0, scaling=LinearScaling()), r"theta must be > 1 for a scaling"),
        (lambda: Rope(fraction=0.1).rotate(X.reshape(2, 5, HEADS, SIZE), INDEX), r"fraction turns no pair of a head of 8"),
        (lambda: T5Bias(buckets=5, bidirectional=True), r"buckets must be even for two directions, got 5"),
        (lambda: T5Bias(buckets=2, bidirectional=True), r"buckets must be >= 2 in each direction, got 2"),
        (lambda: T5Bias(max_distance=16), r"max_distance must be > 16, the exact buckets, got 16"),
        (lambda: Learned(offset=-1), r"offset must be >= 0, got -1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ── biases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(Alibi.slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(Alibi.slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    bias = Alibi().bias({}, np.array([[2]]), np.array([[0, 1, 2, 5]]), 2)
    np.testing.assert_allclose(bias[0, :, 0], [[-2 * 2**-4, -(2**-4), 0, -3 * 2**-4], [-2 * 2**-8, -(2**-8), 0, -3 * 2**-8]])


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_is_blooms_up_to_what_softmax_ignores(heads):
    golden_HM = np.array(make_positions.stored("alibi")[str(heads)])
    bias_HM = Alibi().bias({}, np.array([[11]]), np.arange(12)[None], heads)[0, :, 0]
    np.testing.assert_allclose(bias_HM - bias_HM[:, :1], golden_HM, rtol=1e-5)


@pytest.mark.parametrize("count, most, both", make_positions.BUCKETS)
def test_t5_buckets_are_transformers(count, most, both):
    scheme = T5Bias(buckets=count, max_distance=most, bidirectional=both)
    golden = make_positions.stored("buckets")[f"{count} {most} {both}"]
    np.testing.assert_array_equal(scheme.bucket(np.array(make_positions.DISTANCES)), golden)


@pytest.mark.parametrize("both", [False, True])
def test_t5_biases_are_exact_near_and_logarithmic_far(both):
    buckets, most = 12, 77  # no edge is a whole number
    one_way = buckets // 2 if both else buckets
    exact, table = one_way // 2, RNG.normal(size=(buckets, 2)).astype(np.float32)
    bias = T5Bias(buckets, most, both).bias({"embedding": jnp.asarray(table)}, np.array([[100]]), np.arange(400)[None], 2)
    for key in range(400):
        distance = abs(100 - key) if both else max(100 - key, 0)
        far = exact + int(math.log(max(distance, 1) / exact) / math.log(most / exact) * (one_way - exact))
        bucket = min(distance if distance < exact else far, one_way - 1) + (one_way if both and key > 100 else 0)
        np.testing.assert_allclose(bias[0, :, 0, key], table[bucket], rtol=1e-6)


def test_a_t5_bias_by_rows_is_the_bias_at_once(monkeypatch):
    scheme, queries, keys = T5Bias(buckets=8, max_distance=20), jnp.arange(14).reshape(2, 7), jnp.arange(9)[None]
    table, cotangent = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((8, 3), (2, 3, 7, 9)))

    def both():
        bias, pull = jax.vjp(lambda table: scheme.bias({"embedding": table}, queries, keys, 3), table)
        return bias, pull(cotangent)[0]

    at_once = both()
    monkeypatch.setattr(position, "ONE_HOT", 2 * 9 * 8 * 3)  # three queries at once, of seven
    for got, want in zip(both(), at_once, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_t5_bias_keeps_little_besides_itself():
    """Temporaries of its gradient, as the compiler counts them; with one-hot rows written out they were eight times the bias."""
    step = jax.grad(lambda table, index: jnp.sin(T5Bias().bias({"embedding": table}, index, index, 8)).sum())
    shapes = jax.ShapeDtypeStruct((32, 8), "float32"), jax.ShapeDtypeStruct((1, 2048), "int32")
    compiled = jax.jit(step).lower(*shapes).compile(QUICK)
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 8 * 2048**2 * 4


@pytest.mark.parametrize("row", [row for row in ROWS if row.scheme.parameters(WIDTH, HEADS)], ids=str)
def test_gradients_are_those_of_finite_differences(row):
    params = parameters(row.scheme)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), (params, X))
        shared = row.scheme.shared(HEADS, param=lambda name, *_: params[name])
        if shared:
            # a bias is float32 by contract, and linear in a table: wide steps lose nothing
            check = lambda shared: row.scheme.bias(shared, INDEX, INDEX, HEADS)  # noqa: E731
            check_grads(check, (shared,), order=1, modes=["rev"], eps=0.5, atol=1e-5, rtol=1e-5)
        else:
            check = lambda table, x: row.scheme.embed(x, INDEX, unit=1.0, param=lambda *_: table)  # noqa: E731
            check_grads(check, (params["embedding"], x), order=1, modes=["rev"])


# ── transformers itself ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow  # so that the default tests do not import torch
@pytest.mark.parametrize("name", make_positions.MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_goldens_are_what_transformers_says_today(name):
    pytest.importorskip("transformers")
    now, stored = make_positions.MAKERS[name](), make_positions.stored(name)
    assert jax.tree.structure(now) == jax.tree.structure(stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), now, stored)
