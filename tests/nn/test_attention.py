"""Norms, products, activations, losses and dropout against float64 numpy; attention is in test_attention_*.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from llm_jax.nn.activations import ACTIVATIONS
from llm_jax.nn.dropout import dropout
from llm_jax.nn.kernels.product import product
from llm_jax.nn.losses import cross_entropy
from llm_jax.nn.normalization import LayerNorm, RMSNorm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("contract", [1, 2])
def test_the_products_gradients_are_autodiffs(contract):
    x, w = RNG.normal(size=(3, 2, 4, 5)).astype(np.float32), RNG.normal(size=(*(4, 5)[-contract:], 2, 3)).astype(np.float32)
    axes = (tuple(range(4 - contract, 4)), tuple(range(contract)))
    expected = jax.vjp(lambda x, w: jnp.tensordot(x, w, axes), x, w)
    got = jax.vjp(lambda x, w: product(x, w, contract=contract), x, w)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    cotangent = RNG.normal(size=got[0].shape).astype(np.float32)
    for a, b in zip(got[1](cotangent), expected[1](cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_norms_are_their_formulas():
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    scale, bias = RNG.normal(size=(2, 1, 1, 8)).astype(np.float32)
    x64 = x.astype(np.float64)
    layer = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5) * scale + bias
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(LayerNorm().apply(x, {"scale": scale, "bias": bias}), layer, atol=1e-5)
    np.testing.assert_allclose(RMSNorm().apply(x, {"scale": scale}), rms, atol=1e-5)


def test_activations_are_their_formulas():
    x = np.linspace(-4, 4, 41)
    sigmoid = special.expit(x)
    expected = {
        "identity": x,
        "relu": np.maximum(x, 0),
        "squared_relu": np.maximum(x, 0) ** 2,
        "gelu": x * 0.5 * (1 + special.erf(x / np.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": x * sigmoid,
        "tanh": np.tanh(x),
        "sigmoid": sigmoid,
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, value in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x.astype(np.float32)), value, atol=1e-5, err_msg=name)


def test_cross_entropy_is_minus_log_softmax():
    logits, targets = 30 * RNG.normal(size=(2, 3, 7)).astype(np.float32), RNG.integers(0, 7, (2, 3))
    nll, log_sum = cross_entropy(logits, targets)
    expected = -special.log_softmax(logits.astype(np.float64), -1)
    np.testing.assert_allclose(nll, np.take_along_axis(expected, targets[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_sum, special.logsumexp(logits.astype(np.float64), -1), rtol=1e-6)


def test_dropout_keeps_the_mean_and_zeroes_the_rate():
    x = jnp.ones((100, 1000))
    dropped = dropout(x, 0.3, jax.random.key(0))
    assert abs(float((dropped == 0).mean()) - 0.3) < 0.01 and abs(float(dropped.mean()) - 1) < 0.01
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
