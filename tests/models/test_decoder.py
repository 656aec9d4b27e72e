"""The whole network: causal, packed = unpacked, scanned = unrolled, remat = not, counted right, for every component."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import platform
from llm_jax.core.config import ConfigError, override
from llm_jax.core.sharding import unbox
from llm_jax.models import count
from llm_jax.models.decoder import Decoder
from llm_jax.models.model import abstract_parameters, initial_parameters, stack_layers, unstack_layers
from llm_jax.nn.attention import Chunked, SlidingWindow
from llm_jax.nn.ffn import Dense, Gated, NoFeedForward
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, NoNorm, RMSNorm
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias
from llm_jax.nn.residual import NoResidual, Residual, ReZero, Scaled

VOCABULARY, LENGTH = 11, 12
POSITIONS = [
    NoPosition(),
    Sinusoidal(),
    Learned(max_length=LENGTH),
    Rope(),
    Rope(fraction=0.5),
    Alibi(),
    T5Bias(buckets=4, max_distance=8),
]
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def base(**changes) -> Decoder:
    return override(Decoder(width=16, depth=2, attention=Attention(heads=4)), changes)


def initial(model: Decoder, tokens=TOKENS):
    """Parameters away from their symmetric starting points."""
    params = unbox(model.build(VOCABULARY).init(jax.random.key(0), tokens))["params"]
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def logits(model: Decoder, params, *inputs):
    return model.build(VOCABULARY).apply({"params": params}, *inputs)


def name(component) -> str:
    return type(component).__name__


@pytest.mark.parametrize("position", POSITIONS, ids=name)
def test_no_token_sees_a_later_one(position):
    model = base(position=position)
    params = initial(model)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = logits(model, params, TOKENS), logits(model, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert all(np.abs(before[:, i] - after[:, i]).max() > 1e-4 for i in range(7, LENGTH)), "later tokens should see it"


MASKS = [SlidingWindow(2), SlidingWindow(2, sinks=1), Chunked(3)]
PACKED = [
    *({"position": position} for position in POSITIONS),
    *({"attention.mask": mask, "attention.backend": backend} for mask in MASKS for backend in ("dense", "blockwise")),
]


@pytest.mark.parametrize("changes", PACKED, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_packed_documents_are_as_if_alone(changes, monkeypatch):
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=4, attention_block=4))
    model = base(**changes)
    params, cut = initial(model), 5
    segments = np.array([[0] * cut + [1] * (LENGTH - cut)] * 2, np.int32)
    positions = np.array([[*range(cut), *range(LENGTH - cut)]] * 2, np.int32)
    apart = np.concatenate([logits(model, params, TOKENS[:, :cut]), logits(model, params, TOKENS[:, cut:])], 1)
    np.testing.assert_allclose(logits(model, params, TOKENS, positions, segments), apart, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scanned_and_recomputed_layers_equal_plain_ones(remat):
    plain, scanned = base(layers="unrolled"), base(layers="scanned", remat=remat)
    params = initial(plain)

    def loss(model, params):
        return jnp.square(logits(model, params, TOKENS)).mean()

    expected, got = (
        jax.value_and_grad(lambda p, m=m: loss(m, p))(p) for m, p in ((plain, params), (scanned, stack_layers(params, scanned)))
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), unstack_layers(got[1], scanned), expected[1])


COMPONENTS = [
    *itertools.product([LayerNorm(), RMSNorm(), NoNorm()], ["pre", "post", "sandwich"], [Dense()], [Residual()], [True]),
    *itertools.product(
        [LayerNorm(bias=False)],
        ["pre"],
        [Gated(), Gated(activation="gelu", bias=True), Dense(bias=True), NoFeedForward()],
        [Scaled(), Scaled(learned=True), ReZero(), NoResidual()],
        [True, False],
    ),
]


@pytest.mark.parametrize(
    "norm, placement, ffn, residual, tied", COMPONENTS, ids=lambda c: str(c) if isinstance(c, (str, bool)) else name(c)
)
def test_parameters_are_counted(norm, placement, ffn, residual, tied):
    model = base(norm=norm, placement=placement, ffn=ffn, residual=residual, **{"head.tied": tied})
    tree = jax.eval_shape(model.build(VOCABULARY).init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(unbox(tree))) == count.parameters(model, VOCABULARY)


@pytest.mark.parametrize("position", POSITIONS, ids=name)
@pytest.mark.parametrize(
    "attention",
    [Attention(heads=4, kv_heads=2, bias=True), Attention(heads=4, kv_heads=1), Attention(heads=3, head_dim=4)],
    ids=str,
)
def test_parameters_of_attention_are_counted(position, attention):
    model = base(attention=attention, position=position)
    tree = jax.eval_shape(model.build(VOCABULARY).init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(unbox(tree))) == count.parameters(model, VOCABULARY)


def test_flops_are_those_that_the_compiler_counts():
    model = base(width=64, layers="unrolled", depth=3)
    length, rows = 64, 4
    tokens = np.zeros((rows, length), np.int32)
    params = unbox(model.build(VOCABULARY).init(jax.random.key(0), tokens))["params"]
    step = jax.jit(jax.grad(lambda p: jnp.square(logits(model, p, tokens)).mean()))
    counted = step.lower(params).compile().cost_analysis()["flops"]
    analytic = rows * length * count.flops_per_token(model, VOCABULARY, length)
    assert 0.9 < counted / analytic < 1.35, "elementwise work comes on top of the products"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"attention.heads": 3}, "attention.heads must divide width=16"),
        ({"attention.kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ({"attention.head_dim": 1}, "turns pairs of channels"),
        ({"ffn.ratio": -1.0}, "ffn.ratio must be > 0, got -1.0"),
        ({"dropout.ffn": 1.0}, "dropout.ffn must be in [0, 1), got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(ConfigError) as error:
        base(**changes)
    assert sentence in str(error.value)


def test_a_sequence_longer_than_the_learned_table_is_refused():
    with pytest.raises(ConfigError, match=r"max_length must be at least the sequence length 12, got 8"):
        initial(base(position=Learned(max_length=8)))


def test_scanned_and_unrolled_layers_start_alike():
    changes = {"attention.bias": True, "position": Learned(max_length=LENGTH), "residual": ReZero(), "head.tied": False, "depth": 3}
    unrolled, scanned = (base(layers=layers, **changes) for layers in ("unrolled", "scanned"))
    ours, theirs = (initial_parameters(model, VOCABULARY, jax.random.key(0)) for model in (unrolled, scanned))
    jax.tree.map(np.testing.assert_array_equal, ours, unstack_layers(theirs, scanned))
    for model, params in ((unrolled, ours), (scanned, theirs)):
        shapes = unbox(abstract_parameters(model, VOCABULARY))
        jax.tree.map(lambda a, p: (a.shape, a.dtype) == (p.shape, p.dtype) or pytest.fail(f"{a} {p.shape}"), shapes, params)
    kernels = [ours[f"layers_{i}"]["ffn"]["up"]["kernel"] for i in range(3)]
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.combinations(kernels, 2)), "layers should start differently"
