"""The layers' formulas again in float64 NumPy: values, derivatives, extremes, bfloat16; as written for CPUs and accelerators."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import unbox
from llm_jax.nn.activations import ACTIVATIONS, gelu
from llm_jax.nn.dropout import Dropout, dropout
from llm_jax.nn.ffn import MLP, Dense, Gated, NoFeedForward
from llm_jax.nn.kernels.product import product, products, row_sum, softmax
from llm_jax.nn.losses import cross_entropy
from llm_jax.nn.normalization import LayerNorm, NoNorm, Normalize, RMSNorm
from llm_jax.nn.residual import Connection, HyperConnections, NoResidual, Residual, ReZero, Scaled

ROUNDED = 2.0**-8  # of one rounding to bfloat16, relative
BF16 = jnp.bfloat16


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def f64(x):
    return np.asarray(x).astype(np.float64)


@pytest.fixture(params=["cpu", "tpu"])
def target(request):
    with platform.targeting(request.param):
        yield request.param


def compiled(function):
    """jit under a new identity: jit would remember what it has written for another platform."""
    return jax.jit(lambda *inputs: function(*inputs))


# ── activations ──────────────────────────────────────────────────────────────────────────────────────────────────────
FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "squared_relu": lambda x: np.where(x > 0, x * x, 0),
    "gelu": lambda x: x * 0.5 * special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * special.expit(x),
    "tanh": np.tanh,
    "sigmoid": special.expit,
}
POINTS = np.concatenate([np.linspace(-6, 6, 242), [-100, -20, -6.5, 6.5, 20, 100]])  # without 0, where relu has a kink
every_activation = pytest.mark.parametrize("name", FORMULAS)


def slope(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


def value_and_slope(f, x):
    return f(x), jax.vjp(f, x)[1](jnp.ones_like(x))[0]


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(ACTIVATIONS)


@every_activation
def test_an_activation_and_its_derivative(name):
    value, derivative = value_and_slope(ACTIVATIONS[name], jnp.asarray(POINTS, jnp.float32))
    x = f64(POINTS.astype(np.float32))
    np.testing.assert_allclose(value, FORMULAS[name](x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(derivative, slope(FORMULAS[name], x), rtol=5e-6, atol=5e-6)


@every_activation
def test_an_activation_in_bfloat16_stays_there(name):
    x = jnp.asarray(POINTS, BF16)
    value, derivative = value_and_slope(ACTIVATIONS[name], x)
    assert value.dtype == derivative.dtype == BF16
    np.testing.assert_allclose(f64(value), FORMULAS[name](f64(x)), rtol=4 * ROUNDED, atol=4 * ROUNDED)
    np.testing.assert_allclose(f64(derivative), slope(FORMULAS[name], f64(x)), rtol=8 * ROUNDED, atol=8 * ROUNDED)


def test_gelu_in_bfloat16_is_rounded_once():
    x = jnp.asarray(POINTS, BF16)
    value, derivative = value_and_slope(gelu, x)
    np.testing.assert_allclose(f64(value), FORMULAS["gelu"](f64(x)), rtol=ROUNDED, atol=1e-6)
    np.testing.assert_allclose(f64(derivative), slope(FORMULAS["gelu"], f64(x)), rtol=ROUNDED, atol=1e-6)


def test_gelus_second_derivative():
    x = jnp.asarray(POINTS, jnp.float32)
    second = jax.jvp(lambda x: jax.vjp(gelu, x)[1](jnp.ones_like(x))[0], (x,), (jnp.ones_like(x),))[1]
    x = f64(x)
    np.testing.assert_allclose(second, (2 - x**2) * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), atol=1e-6)


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def layer_norm(x, epsilon, scale, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, epsilon, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * scale


NORMS = [
    (LayerNorm(), layer_norm, 1e-5),
    (LayerNorm(bias=False), layer_norm, 1e-5),
    (LayerNorm(epsilon=0.5), layer_norm, 0.5),
    (RMSNorm(), rms_norm, 1e-6),
    (RMSNorm(epsilon=0.5), rms_norm, 0.5),
    (RMSNorm(offset=True), lambda x, epsilon, scale: rms_norm(x, epsilon, 1 + scale), 1e-6),
]
INPUTS = {
    "normal": normal(2, 3, 24),
    "far from 0": 100 + normal(2, 3, 24),
    "large": 1e6 * normal(2, 3, 24),
    "as small as ε": 1e-3 * normal(2, 3, 24),
    "zero": np.zeros((2, 3, 24), np.float32),
}


def vectors(norm):
    return {name: 1 + normal(24, seed=seed) for seed, name in enumerate(norm.vectors(), 1)}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("norm, formula, epsilon", NORMS, ids=lambda c: "" if callable(c) else str(c))
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["float32", "bfloat16"])
def test_a_norm(norm, formula, epsilon, x, dtype):
    x, learned = jnp.asarray(x, dtype), vectors(norm)
    got = Normalize(norm).apply({"params": learned}, x)
    assert got.dtype == dtype
    expected = formula(f64(x), epsilon, **{name: f64(v) for name, v in learned.items()})
    np.testing.assert_allclose(f64(got), expected, rtol=1e-5 if dtype == jnp.float32 else ROUNDED, atol=5e-5)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("norm", [LayerNorm(), LayerNorm(bias=False), RMSNorm(), RMSNorm(offset=True)], ids=str)
def test_a_norms_gradients(norm):
    with jax.enable_x64(True):
        learned = {name: jnp.asarray(v, jnp.float64).reshape(1, 1, -1) for name, v in vectors(norm).items()}
        check_grads(compiled(norm.apply), (jnp.asarray(normal(2, 3, 24), jnp.float64), learned), order=1, modes=["rev"])


def test_norms_start_as_the_plain_formula_and_no_norm_is_the_identity():
    x = normal(2, 3, 24)
    for norm, _, epsilon in NORMS:
        plain = layer_norm if isinstance(norm, LayerNorm) else rms_norm
        params = unbox(Normalize(norm).init(jax.random.key(0), x))
        assert {name: v.shape for name, v in params["params"].items()} == dict.fromkeys(norm.vectors(), (24,))
        np.testing.assert_allclose(Normalize(norm).apply(params, x), plain(f64(x), epsilon, 1.0), atol=1e-5)
    assert not Normalize(NoNorm()).init(jax.random.key(0), x)
    np.testing.assert_array_equal(Normalize(NoNorm()).apply({}, x), x)


# ── products, row sums, softmax ──────────────────────────────────────────────────────────────────────────────────────
def plain_products(x, *kernels, contract=1):
    return [jnp.tensordot(x, kernel, contract) for kernel in kernels]


def plain_softmax(x):
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


PRIMITIVES = {
    "product to more": (product, lambda x, w: plain_products(x, w)[0], [(2, 3, 4), (4, 7)]),
    "product to fewer": (product, lambda x, w: plain_products(x, w)[0], [(2, 3, 7), (7, 4)]),
    "product to heads": (product, lambda x, w: plain_products(x, w)[0], [(2, 3, 4), (4, 2, 5)]),
    "product from heads": (
        lambda x, w: product(x, w, contract=2),
        lambda x, w: plain_products(x, w, contract=2)[0],
        [(2, 3, 4, 2), (4, 2, 5)],
    ),
    "products of one": (lambda x, *w: products(x, w), plain_products, [(2, 3, 4), (4, 7)]),
    "products": (lambda x, *w: products(x, w), plain_products, [(2, 3, 4), (4, 2, 5), (4, 1, 5), (4, 3)]),
    "products from heads": (
        lambda x, *w: products(x, w, contract=2),
        lambda x, *w: plain_products(x, *w, contract=2),
        [(3, 4, 2), (4, 2, 3), (4, 2, 1, 2)],
    ),
    "row sum": (row_sum, lambda x: x.sum(-1, keepdims=True), [(2, 3, 5)]),
    "softmax": (softmax, plain_softmax, [(2, 3, 5)]),
    "softmax of one": (softmax, plain_softmax, [(2, 3, 1)]),
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=False), [(2, 3)]),
}
every_primitive = pytest.mark.parametrize("function, plain, shapes", PRIMITIVES.values(), ids=PRIMITIVES)


def operands(shapes, dtype=jnp.float32, seed=0):
    return tuple(jnp.asarray(normal(*shape, seed=seed + index), dtype) for index, shape in enumerate(shapes))


def close(got, expected, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def bent(function):
    """A scalar that depends on every entry of the result in its own way and is curved in it."""

    def total(*inputs):
        outputs = jax.tree.leaves(function(*inputs))
        return sum((jnp.sin(y + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)) * y).sum() for y in outputs)

    return total


def derivatives(function, inputs, directions):
    """The value, the gradient by every input, and the Hessian times `directions`, forwards over reverse as Sophia takes it."""
    gradient = jax.grad(bent(function), argnums=tuple(range(len(inputs))))
    return function(*inputs), *jax.jvp(lambda *p: gradient(*p), inputs, directions)


@pytest.mark.usefixtures("target")
@every_primitive
def test_a_primitive_equals_plain_jnp_up_to_its_second_derivatives(function, plain, shapes):
    inputs, directions = operands(shapes), operands(shapes, seed=9)
    got, expected = jax.jit(lambda *p: [derivatives(f, *p) for f in (function, plain)])(inputs, directions)
    close(got, expected, 2e-5)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    "name, order", [("product to more", 2), ("product to fewer", 2), ("products", 1), ("row sum", 2), ("softmax", 2)]
)
def test_a_primitives_gradients_are_those_of_finite_differences(name, order):
    function, _, shapes = PRIMITIVES[name]
    with jax.enable_x64(True):
        check_grads(compiled(function), operands(shapes, jnp.float64), order=order, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name, written", [("products", (1, 3)), ("row sum", (1, 0)), ("softmax", (1, 0))])
def test_the_platforms_write_them_differently(name, written):
    function, _, shapes = PRIMITIVES[name]
    for at, expected in zip(("cpu", "tpu"), written, strict=True):
        with platform.targeting(at):
            assert str(jax.make_jaxpr(lambda *p: function(*p))(*operands(shapes))).count("dot_general[") == expected


@pytest.mark.parametrize("mesh, written", [(Mesh(data=2), 1), (Mesh(data=1, tensor=2), 3)], ids=["data", "tensor"])
def test_split_kernels_are_not_joined(mesh, written):
    function, _, shapes = PRIMITIVES["products"]
    with jax.set_mesh(mesh.build(jax.devices()[:2])):
        assert str(jax.make_jaxpr(lambda *p: function(*p))(*operands(shapes))).count("dot_general[") == written


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    "row, expected",
    [
        ([0, 0, 0, 0], [0.25] * 4),
        ([1e4, 1e4, -1e4, -1e30], [0.5, 0.5, 0, 0]),
        ([3e38, 0, -3e38, 1], [1, 0, 0, 0]),
        ([-1e30, -1e30, -1e30, -1e30], [0.25] * 4),
        ([-jnp.inf, 0, 0, -jnp.inf], [0, 0.5, 0.5, 0]),
    ],
    ids=str,
)
def test_softmax_of_extremes_and_its_derivatives_are_finite(row, expected):
    x, g = jnp.array([row], jnp.float32), jnp.array([[1.0, -2.0, 3.0, 0.5]])
    p, g64 = np.array([expected]), f64(g)

    def gradient(x):
        return jax.vjp(softmax, x)[1](g)[0]

    got, curvature = jax.jvp(gradient, (x,), (g,))
    centred = g64 - (g64 * p).sum()
    np.testing.assert_allclose(softmax(x), p, atol=1e-7)
    np.testing.assert_allclose(got, p * centred, atol=1e-6)
    np.testing.assert_allclose(curvature, p * centred**2 - p * (g64 * p * centred).sum(), atol=1e-6)


# ── feed-forward networks ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "config, width, hidden",
    [
        (Dense(), 16, 64),
        (Dense(ratio=2.5), 5, 12),
        (Dense(ratio=0.01), 16, 1),
        (Gated(), 768, 2048),
        (Gated(), 16, 43),
        (Gated(multiple=8), 16, 48),
        (Gated(multiple=64), 768, 2048),
        (Gated(multiple=256), 4096, 11008),
        (Gated(ratio=1.0, multiple=16), 1, 16),
        (NoFeedForward(), 16, 0),
    ],
    ids=str,
)
def test_hidden_units(config, width, hidden):
    assert config.hidden(width) == hidden


def test_a_gate_without_hidden_units_is_refused():
    with pytest.raises(ConfigError, match=r"ffn\.ratio leaves no hidden unit"):
        MLP(Gated(ratio=0.01), 1.0, jnp.float32).init(jax.random.key(0), normal(1, 2, 16), {})


NETWORKS = {
    "dense gelu": Dense(),
    "dense squared relu, biased": Dense(ratio=1.5, activation="squared_relu", bias=True),
    "SwiGLU": Gated(),
    "SwiGLU, rounded up": Gated(multiple=8),
    "GEGLU, biased": Gated(activation="gelu", bias=True),
    "ReGLU": Gated(activation="relu"),
    "GLU": Gated(ratio=1.0, activation="sigmoid"),
    "bilinear": Gated(activation="identity", multiple=4),
}


def layer(x, params):
    return x @ f64(params["kernel"]) + f64(params.get("bias", 0.0))


def network(config, x, params):
    hidden = layer(x, params["gate"]) if isinstance(config, Gated) else layer(x, params["up"])
    hidden = FORMULAS[config.activation](hidden)
    return layer(hidden * layer(x, params["up"]) if isinstance(config, Gated) else hidden, params["down"])


def given(config, width):
    names = {"up": (width, config.hidden(width)), "down": (config.hidden(width), width)}
    if isinstance(config, Gated):
        names["gate"] = names["up"]
    return {
        name: {"kernel": normal(*shape, seed=seed) / math.sqrt(shape[0])}
        | ({"bias": normal(shape[1], seed=seed + 10)} if config.bias else {})
        for seed, (name, shape) in enumerate(names.items(), 1)
    }


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_a_feed_forward_network(config):
    x, params, module = normal(2, 3, 10), given(config, 10), MLP(config, 0.5, jnp.float32)
    shapes = jax.tree.map(jnp.shape, unbox(jax.eval_shape(module.init, jax.random.key(0), x, {})["params"]))
    assert shapes == jax.tree.map(np.shape, params)
    got = compiled(module.apply)({"params": params}, x, {})
    np.testing.assert_allclose(got, network(config, f64(x), params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [Dense(bias=True), Gated(bias=True)], ids=["dense", "gated"])
def test_a_feed_forward_network_in_bfloat16_stays_there(config):
    x, params = jnp.asarray(normal(2, 3, 10), BF16), given(config, 10)
    got = MLP(config, 0.5, BF16).apply({"params": params}, x, {})
    assert got.dtype == BF16
    np.testing.assert_allclose(f64(got), network(config, f64(x), params), rtol=8 * ROUNDED, atol=8 * ROUNDED)


def test_a_feed_forward_network_starts_with_its_gain():
    module = MLP(Gated(ratio=2.0, bias=True), 0.5, BF16)
    params = unbox(module.init(jax.random.key(0), jnp.zeros((1, 1, 96), BF16), {}))["params"]
    for name, linear in params.items():
        fan_in, gain = linear["kernel"].shape[0], 0.5 if name == "down" else 1.0
        assert linear["kernel"].dtype == jnp.float32 and not linear["bias"].any()
        np.testing.assert_allclose(linear["kernel"].std() * math.sqrt(fan_in), gain, rtol=0.02)


# ── residual connections ─────────────────────────────────────────────────────────────────────────────────────────────
X, BRANCH, DEPTH = normal(2, 3, 4), normal(2, 3, 4, seed=1), 6
RESIDUALS = [  # factors of the stream and of the branch, at the start and with a learned scale of 0.7
    (Residual(), (1, 1), None),
    (NoResidual(), (0, 1), None),
    (Scaled(), (1, 1 / math.sqrt(12)), None),
    (Scaled(learned=True), (1, 1 / math.sqrt(12)), (1, 0.7)),
    (ReZero(), (1, 0), (1, 0.7)),
]


class Joined(nn.Module):
    """A connection with a branch whose result is given."""

    config: Residual
    depth: int = DEPTH

    @nn.compact
    def __call__(self, x, branch, place=0):
        seen, write = Connection(self.config, self.depth, name="connection")(x, jnp.int32(place))
        return write(branch), seen


@pytest.mark.parametrize("config, start, learned", RESIDUALS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (BF16, 4 * ROUNDED)], ids=["float32", "bfloat16"])
def test_a_residual_connection(config, start, learned, dtype, tolerance):
    module, x, branch = Joined(config), jnp.asarray(X, dtype), jnp.asarray(BRANCH, dtype)
    params = unbox(module.init(jax.random.key(0), x, branch))
    assert [p.shape for p in jax.tree.leaves(params)] == ([(1,)] if learned else [])
    for factors, given in [
        (start, params),
        *([(learned, {"params": {"connection": {"scale": jnp.array([0.7])}}})] if learned else []),
    ]:
        got, seen = module.apply(given, x, branch)
        np.testing.assert_array_equal(seen, x)
        assert got.dtype == dtype
        np.testing.assert_allclose(f64(got), factors[0] * f64(x) + factors[1] * f64(branch), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", [Scaled(learned=True), ReZero()], ids=str)
def test_a_learned_scale_has_the_branch_as_its_gradient(config):
    module = Joined(config)
    params, g = unbox(module.init(jax.random.key(0), X, BRANCH)), normal(2, 3, 4, seed=2)
    gradient = jax.grad(lambda params: (g * module.apply(params, X, BRANCH)[0]).sum())(params)["params"]["connection"]["scale"]
    np.testing.assert_allclose(gradient, [(f64(g) * f64(BRANCH)).sum()], rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections_start_as_the_plain_residual(dynamic):
    """Each of the copies is the plain stream, and branch `place` reads copy place mod n (Zhu et al. 2025, eq. 14)."""
    config, copies = HyperConnections(rate=3, dynamic=dynamic), normal(2, 3, 3, 4)
    for place in (0, 1, 5):
        params = unbox(Joined(config).init(jax.random.key(0), copies, BRANCH, place))
        got, seen = Joined(config).apply(params, copies, BRANCH)
        np.testing.assert_allclose(seen, copies[:, :, place % 3], atol=1e-6)
        np.testing.assert_allclose(got, copies + BRANCH[:, :, None], atol=1e-6)
    assert sum(p.size for p in jax.tree.leaves(params)) == config.parameters(4)
    np.testing.assert_allclose(config.close(config.open(BRANCH)), 3 * BRANCH, rtol=1e-6)  # their sum leaves the last layer


def test_hyper_connections_are_their_equations():
    """Ibid., eq. 2-5 and 10-13 in float64, with every parameter away from its start."""
    config, copies, n = HyperConnections(rate=3), normal(2, 3, 3, 4), 3
    start = unbox(Joined(config).init(jax.random.key(0), copies, BRANCH))
    params = jax.tree.map(lambda p: p + 0.5 * jax.random.normal(jax.random.key(p.size), p.shape), start)
    got, seen = Joined(config).apply(params, copies, BRANCH)
    p = {name: f64(value) for name, value in params["params"]["connection"].items()}
    h = f64(copies)
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    alpha = p["scale_in"] * np.tanh(normed @ p["read_kernel"]) + p["read"]
    mix = p["scale_in"] * np.tanh(normed @ p["mix_kernel"]) + p["mix"]
    beta = p["scale_out"] * np.tanh(normed @ p["write_kernel"]) + p["write"]
    expected = np.stack([sum(mix[:, :, i, j, None] * h[:, :, i] for i in range(n)) for j in range(n)], 2)
    np.testing.assert_allclose(seen, (alpha * h).sum(2), atol=1e-5)
    np.testing.assert_allclose(got, expected + beta * f64(BRANCH)[:, :, None], atol=1e-5)


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────
ENTRIES, KEY = 100_000, jax.random.PRNGKey(3)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["float32", "bfloat16"])
def test_dropout_scales_what_it_keeps(rate, dtype):
    x = jnp.asarray(1 + np.arange(ENTRIES) % 7, dtype)
    y = dropout(x, rate, KEY)
    kept = f64(y != 0)
    assert y.dtype == dtype
    np.testing.assert_allclose(f64(y), kept * f64(x) / (1 - rate), rtol=1e-6 if dtype == jnp.float32 else 2 * ROUNDED)
    deviation = math.sqrt(rate * (1 - rate) / ENTRIES)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation
    spread = deviation * math.sqrt(np.square(f64(x)).mean()) / (1 - rate)
    assert abs(f64(y).mean() - f64(x).mean()) < 5 * spread + (0 if dtype == jnp.float32 else ROUNDED * f64(x).mean())


def test_dropout_at_a_rate_of_zero_or_without_a_key_is_the_identity():
    np.testing.assert_array_equal(dropout(X, 0.0, KEY), X)
    np.testing.assert_array_equal(dropout(X, jnp.float32(0), KEY), X)
    np.testing.assert_array_equal(dropout(X, 0.5, None), X)


def test_dropout_depends_on_its_key_alone():
    first, other = jax.random.split(KEY)
    x = jnp.ones(1000)
    np.testing.assert_array_equal(dropout(x, 0.5, first), dropout(x, 0.5, first))
    agreeing = float((dropout(x, 0.5, first) == dropout(x, 0.5, other)).mean())
    assert abs(agreeing - 0.5) < 5 * math.sqrt(0.25 / 1000), "masks of different keys should be independent"


def test_dropout_takes_the_rates_of_a_population():
    rates = [0.0, 0.1, 0.6]
    together = jax.jit(jax.vmap(lambda rate: dropout(jnp.ones(1000), rate, KEY)))(jnp.array(rates))
    np.testing.assert_allclose(together, [dropout(jnp.ones(1000), rate, KEY) for rate in rates], rtol=1e-6)


def test_dropouts_gradient_is_its_mask():
    x = 1 + jnp.abs(normal(1000))
    y, pull = jax.vjp(lambda x: dropout(x, 0.4, KEY), x)
    np.testing.assert_allclose(pull(jnp.ones(1000))[0], f64(y != 0) / 0.6, rtol=1e-6)


def test_the_ffn_drops_hidden_units():
    config = Dense(ratio=1.0, activation="identity")
    params = {"up": {"kernel": np.eye(200, dtype=np.float32)}, "down": {"kernel": np.eye(200, dtype=np.float32)}}
    got = MLP(config, 1.0, jnp.float32).apply({"params": params}, jnp.ones((1, 50, 200)), {"ffn": 0.2}, rngs={"dropout": KEY})
    np.testing.assert_allclose(np.unique(got), [0, 1.25], rtol=1e-6)
    assert abs(float((got == 0).mean()) - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 10_000)


def test_only_sites_that_may_drop_are_listed():
    assert Dropout().rates() == {}
    assert Dropout(attention=0.1, ffn=0.2).rates() == {"attention": 0.1, "ffn": 0.2}


# ── cross-entropy ────────────────────────────────────────────────────────────────────────────────────────────────────
LOGITS = {
    "normal": normal(2, 3, 7),
    "wide": 30 * normal(2, 3, 7),
    "equal": np.full((2, 3, 7), 1e4, np.float32),
    "huge": 1e4 * normal(2, 3, 7),
    "beyond exp": np.float32(1e38) * np.clip(normal(2, 3, 7), -1, 1),
    "masked": np.where(np.arange(7) % 2, np.float32(-1e30), normal(2, 3, 7)),
    "certain": np.where(np.arange(7) == 4, np.float32(200), normal(2, 3, 7)),
}
every_kind_of_logits = pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
TARGETS = np.array([[0, 1, 2], [4, 6, 4]], np.int32)


@pytest.mark.usefixtures("target")
@every_kind_of_logits
@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["float32", "bfloat16"])
def test_cross_entropy(logits, dtype):
    logits = jnp.asarray(logits, dtype)
    nll, log_sum = cross_entropy(logits, TARGETS)
    assert nll.dtype == log_sum.dtype == jnp.float32 and nll.shape == log_sum.shape == (2, 3)
    expected_sum = special.logsumexp(f64(logits), -1)
    expected = expected_sum - np.take_along_axis(f64(logits), TARGETS[..., None], -1)[..., 0]
    size = 1 + np.abs(expected_sum) + np.abs(expected)  # float32 takes the difference of two numbers of that size
    np.testing.assert_allclose(log_sum, expected_sum, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nll / size, expected / size, atol=3e-7)


@pytest.mark.usefixtures("target")
@every_kind_of_logits
def test_cross_entropys_derivatives(logits):
    p, hot = special.softmax(f64(logits), -1), np.eye(7)[TARGETS]
    directions, weight = normal(2, 3, 7, seed=1), normal(2, 3, seed=2)
    along = f64(directions)

    def gradient(logits):
        return jax.vjp(lambda x: cross_entropy(x, TARGETS), logits)[1]((jnp.ones((2, 3)), weight))[0]

    got, curvature = jax.jvp(gradient, (logits,), (directions,))
    w = f64(weight)[..., None]
    np.testing.assert_allclose(got, p - hot + w * p, atol=2e-6)
    np.testing.assert_allclose(curvature, (1 + w) * p * (along - (p * along).sum(-1, keepdims=True)), atol=5e-6)


@pytest.mark.usefixtures("target")
def test_cross_entropy_of_a_large_vocabulary():
    logits, targets = 5 * normal(2, 50_257), np.array([0, 50_256])
    expected = -special.log_softmax(f64(logits), -1)[np.arange(2), targets]
    np.testing.assert_allclose(cross_entropy(logits, targets)[0], expected, rtol=1e-6)
