"""Losses by blocks of tokens against logits written out in float64, on one device and on a mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from llm_jax.core import platform
from llm_jax.core.mesh import Mesh
from llm_jax.nn.kernels import blocks
from llm_jax.nn.kernels.unembedding import Unembedding
from llm_jax.nn.losses import cross_entropy

B, L, D, V = 4, 7, 8, 24  # 28 tokens: no number of blocks but 1, 2, 4, 7 and 14 divides them
RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, V, (B, L)).astype(np.int32)
WEIGHTS = np.float32(RNG.integers(0, 3, (B, L)))
HIDDEN, MATRIX, BIAS = (np.float32(RNG.normal(size=shape)) for shape in ((B, L, D), (D, V), (V,)))

LAYERS = {
    "matrix": Unembedding(HIDDEN, MATRIX),
    "table": Unembedding(HIDDEN, MATRIX.T.copy(), table=True),
    "all": Unembedding(HIDDEN, MATRIX.T.copy(), BIAS, table=True, multiplier=0.5, soft_cap=3.0),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, logits_at_once=3 * V, tokens_at_once=5))


def nll(values, logits, targets):
    return cross_entropy(logits, targets)[0] * values.get("scale", 1.0)


def total(unembedding, weights=WEIGHTS, **values):
    return blocks.total(nll, unembedding, TARGETS, weights, values)


def written_out(unembedding):
    """Σ weight · nll, and its gradients for hidden states, matrix (`[D, V]`), bias and weights, in float64."""
    u = jax.tree.map(lambda x: np.float64(np.asarray(x, np.float32)), unembedding)
    raw = u.multiplier * (u.hidden @ (u.matrix.T if u.table else u.matrix) + (0 if u.bias is None else u.bias))
    logits = raw if u.soft_cap is None else u.soft_cap * np.tanh(raw / u.soft_cap)
    log_p = log_softmax(logits, -1)
    nll_BL = -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    slope = WEIGHTS[..., None] * (np.exp(log_p) - np.eye(V)[TARGETS]) * u.multiplier
    slope = slope if u.soft_cap is None else slope * (1 - np.tanh(raw / u.soft_cap) ** 2)
    matrix_DV = np.einsum("bld,blv->dv", u.hidden, slope)
    hidden = slope @ (u.matrix if u.table else u.matrix.T)
    grads = Unembedding(hidden, matrix_DV.T if u.table else matrix_DV, None if u.bias is None else slope.sum((0, 1)))
    return (WEIGHTS * nll_BL).sum(), grads, nll_BL


def assert_close(got, expected, tolerance=1e-5):
    for name in ("hidden", "matrix", "bias"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if b is not None:
            np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("name", LAYERS)
def test_the_sum_and_its_gradient_are_those_of_dense_float64(name):
    expected, grads, nll_BL = written_out(LAYERS[name])
    assert not blocks.at_once(LAYERS[name])
    got, (slopes, weights) = jax.jit(jax.value_and_grad(total, (0, 1)))(LAYERS[name], WEIGHTS)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_close(slopes, grads)
    np.testing.assert_allclose(weights, nll_BL, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(total)(LAYERS[name]), expected, rtol=1e-5)


def test_the_gradient_is_scaled_by_what_follows():
    slopes = jax.jit(jax.grad(lambda u: jnp.square(total(u)) / 2))(LAYERS["all"])
    expected, grads, _ = written_out(LAYERS["all"])
    assert_close(jax.tree.map(lambda x: x / expected, slopes), grads)


def test_bfloat16_operands_are_summed_in_float32():
    layer = replace(LAYERS["all"], hidden=jnp.bfloat16(HIDDEN), matrix=jnp.bfloat16(MATRIX.T))
    expected, grads, _ = written_out(layer)
    got, slopes = jax.jit(jax.value_and_grad(total))(layer)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert slopes.hidden.dtype == slopes.matrix.dtype == jnp.bfloat16 and slopes.bias.dtype == jnp.float32
    assert_close(slopes, grads, 1e-2)


def test_scores_are_those_of_each_token():
    judge = lambda _, logits, targets: {"nll": cross_entropy(logits, targets)[0], "best": logits.argmax(-1)}  # noqa: E731
    got = jax.jit(lambda u: blocks.each(judge, u, TARGETS, {}))(LAYERS["all"])
    np.testing.assert_allclose(got["nll"], written_out(LAYERS["all"])[2], rtol=1e-5)
    np.testing.assert_array_equal(got["best"], LAYERS["all"].logits().argmax(-1))


def test_a_population_has_values_of_its_own():
    layers = jax.tree.map(lambda x: np.stack([x, 2 * x]), LAYERS["all"])
    one = jax.jit(jax.grad(lambda u, scale: total(u, scale=scale)))
    got = jax.jit(jax.vmap(one))(layers, np.float32([1, 3]))
    for member, scale in enumerate((1.0, 3.0)):
        alone = one(jax.tree.map(lambda x: x[member], layers), scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[member], b, rtol=1e-4, atol=1e-5), got, alone)


def test_its_gradient_can_be_differentiated_forwards():
    """What Sophia's Hessian-vector products do, against the same with logits written out."""
    way = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), LAYERS["all"])
    dense = lambda u: (cross_entropy(u.logits(), TARGETS)[0] * WEIGHTS).sum()  # noqa: E731
    got, expected = (jax.jit(lambda f=f: jax.jvp(jax.grad(f), (LAYERS["all"],), (way,))[1])() for f in (total, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), got, expected)


def test_no_array_holds_all_logits():
    text = jax.jit(jax.value_and_grad(total)).lower(LAYERS["all"]).as_text()
    assert f"5x{V}xf32" in text
    assert not any(shape in text for shape in (f"{B}x{L}x{V}x", f"{B * L}x{V}x", f"6x5x{V}x"))


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"data": 1, "sequence": 7}], ids=str)
def test_a_mesh_changes_no_number(axes):
    """The vocabulary over `tensor`, rows over `data` and `fsdp`; four rows do not divide over eight devices, and stay together."""
    expected, grads, nll_BL = written_out(LAYERS["all"])
    mesh = Mesh(**axes).build(jax.devices()[:8])
    with jax.set_mesh(mesh):
        got, slopes = jax.jit(jax.value_and_grad(total))(LAYERS["all"])
        each = jax.jit(lambda u: blocks.each(nll, u, TARGETS, {}))(LAYERS["all"])
        if "tensor" in axes:
            assert blocks._blocks(LAYERS["all"]) == 2, "7 tokens of a device by 12 of the vocabulary"
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_close(slopes, grads)
    np.testing.assert_allclose(each, nll_BL, rtol=1e-5)
