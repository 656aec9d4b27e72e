"""Every layer and custom VJP against finite differences in float64, and the checks that a user's model goes through."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llm_jax.core import platform
from llm_jax.core.config import Config, ConfigError, components, override
from llm_jax.core.sharding import unbox
from llm_jax.lab.components import (
    LSTM,
    MLA,
    Alibi,
    Attention,
    Bidirectional,
    Capacity,
    Causal,
    Chunked,
    Continuation,
    Decoder,
    Dense,
    Dropless,
    Dropout,
    DynamicScaling,
    Embed,
    Encoder,
    EncoderDecoder,
    ExpertChoice,
    Gated,
    HyperConnections,
    LanguageModel,
    Layer,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    MoE,
    MultiToken,
    NextToken,
    NoFeedForward,
    NoMixing,
    NoNorm,
    NoPosition,
    NoResidual,
    NtkScaling,
    Prefix,
    Residual,
    ReZero,
    RMSNorm,
    Rope,
    Scalar,
    Scaled,
    SequenceClassifier,
    Sigmoid,
    Sinusoidal,
    SlidingWindow,
    Softmax,
    Stack,
    T5Bias,
    TokenClassifier,
    YarnScaling,
)
from llm_jax.models.heads import Head
from llm_jax.nn.activations import ACTIVATIONS, gelu
from llm_jax.nn.attention import Bias, Mask, Places, attend
from llm_jax.nn.context import Context, Memory
from llm_jax.nn.dispatch import Dispatch
from llm_jax.nn.ffn import FeedForward
from llm_jax.nn.kernels.grouped import exchange, grouped_products
from llm_jax.nn.kernels.product import product, softmax
from llm_jax.nn.latent import absorbed
from llm_jax.nn.losses import cross_entropy
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.normalization import Norm, Normalize
from llm_jax.nn.position import Position, Positions
from llm_jax.nn.residual import Connection
from llm_jax.nn.rope import Scaling
from llm_jax.nn.routing import Router, balance_loss, z_loss
from llm_jax.train import check

ROWS, LENGTH, WIDTH = 2, 7, 8
SEGMENTS = jnp.asarray([[0] * LENGTH, [0] * 3 + [1] * 3 + [-1]], jnp.int32)
HEADS = Attention(heads=2)


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_derivative(function, tree):
    """Of a weighted sum of all that `function` returns, by each leaf of the tree alone."""
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(jax.eval_shape(function, tree))
        ways = [array(*leaf.shape, seed=9) for leaf in leaves]
        assert all(leaf.dtype == jnp.float64 for leaf in leaves), "something is narrowed on the way"
        errors = check.derivative_errors(
            lambda tree: sum((way * out).sum() for way, out in zip(ways, jax.tree.leaves(function(tree)), strict=True)), tree
        )
    assert max(errors.values()) < check.DERIVATIVE, errors


def with_parameters(module, *inputs, mutable=()):
    """The module as a function of its parameters and its first input, and a tree of both."""
    x, *rest = inputs
    with jax.enable_x64(True):
        start = unbox(jax.eval_shape(module.init, jax.random.key(0), x, *rest)).get("params", {})
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape), start)

    def function(tree):
        return module.apply({"params": tree["params"]}, tree["x"], *rest, mutable=list(mutable) or False)

    return function, {"params": params, "x": x}


# ── one by one ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    assert_derivative(ACTIVATIONS[name], array(ROWS, WIDTH))


NORMS = [LayerNorm(), LayerNorm(bias=False), RMSNorm(), RMSNorm(offset=True), NoNorm()]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms(norm):
    assert_derivative(*with_parameters(Normalize(norm), array(ROWS, LENGTH, WIDTH)))


NETWORKS = [Dense(bias=True), Gated(bias=True), Gated(activation="gelu")]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_feed_forward_networks(network):
    assert_derivative(*with_parameters(network.build(1.0, jnp.float64, None), array(ROWS, LENGTH, WIDTH), {}))


EXPERTS = {
    "softmax, ragged": MoE(4, 2, dispatch=Dropless(form="ragged"), z_loss=0.1),
    "softmax, blocks": MoE(4, 2, dispatch=Dropless(form="blocks", block=4), expert=Dense(bias=True)),
    "groups, shared": MoE(4, 2, router=Softmax(groups=2, active_groups=1, renormalize=False), shared=Gated()),
    "sigmoid, bias": MoE(4, 2, router=Sigmoid(bias=True, scale=2.5), balance_over="row", expert=Gated(bias=True)),
    "capacity by choice": MoE(4, 2, dispatch=Capacity(factor=0.7)),
    "capacity by position": MoE(4, 2, dispatch=Capacity(factor=0.7, over="batch", priority="position")),
    "expert choice": MoE(4, 2, router=ExpertChoice()),
    "expert choice by row": MoE(4, 2, router=ExpertChoice(over="row", capacity=0.5)),
}


@pytest.mark.parametrize("moe", EXPERTS.values(), ids=EXPERTS)
def test_experts(moe):
    """Choices are made by large differences: near ties, finite differences see another choice than the gradient."""
    apply, tree = with_parameters(
        moe.build(1.0, jnp.float64, None), array(ROWS, LENGTH, WIDTH), {}, SEGMENTS >= 0, mutable=["routing"]
    )

    def function(tree):
        y_BLD, sown = apply(tree)
        return y_BLD, moe.penalty(sown["routing"]).mean

    assert_derivative(function, tree)


def test_losses():
    targets = jnp.asarray(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % WIDTH)
    assert_derivative(lambda logits: cross_entropy(logits, targets), 3 * array(ROWS, LENGTH, WIDTH))
    valid_BL, load_BE = SEGMENTS >= 0, jnp.asarray(abs(array(ROWS, 4)))
    losses = (
        lambda x: balance_loss(jax.nn.softmax(x), load_BE, valid_BL, over="row").total,
        lambda x: balance_loss(jax.nn.sigmoid(x), load_BE, None).total,
        lambda x: z_loss(x, valid_BL).total,
    )
    assert_derivative(lambda x: [loss(x) for loss in losses], array(ROWS, LENGTH, 4))


RESIDUALS = [
    Residual(),
    NoResidual(),
    Scaled(learned=True),
    ReZero(),
    HyperConnections(rate=3),
    HyperConnections(rate=2, dynamic=False),
]


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_residuals(residual):
    shape = (ROWS, LENGTH, *([residual.streams] if residual.streams > 1 else []), WIDTH)
    import flax.linen as nn

    class Joined(nn.Module):
        """A branch that is tanh."""

        @nn.compact
        def __call__(self, x):
            seen, write = Connection(residual, 2)(x, jnp.int32(1))
            return residual.close(write(jnp.tanh(seen)))

    assert_derivative(*with_parameters(Joined(), array(*shape)))


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────
MIXERS = [
    Attention(heads=4, kv_heads=2, bias=True, output_bias=False, qk_norm=RMSNorm()),
    Attention(heads=4, kv_heads=1, head_dim=3, soft_cap=2.0, sinks=True, scale=0.3),
    Attention(heads=2, backend="blockwise", sinks=True, soft_cap=2.0),
    MLA(heads=2, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=3),
    MLA(heads=2, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, value_dim=3, norm=LayerNorm(), bias=True),
    LSTM(),
    LSTM(units=5),
]
MASKS = [
    Causal(),
    Bidirectional(),
    Prefix(),
    SlidingWindow(3, sinks=1),
    SlidingWindow(2, causal=False),
    Chunked(3),
]
SCALINGS = [
    LinearScaling(),
    NtkScaling(),
    DynamicScaling(original_length=4),
    YarnScaling(original_length=4),
    Llama3Scaling(original_length=4),
]
POSITIONS = [
    NoPosition(),
    Sinusoidal(),
    Sinusoidal(interleaved=False),
    Learned(max_length=LENGTH),
    Rope(),
    Rope(fraction=0.5),
    *(Rope(scaling=scaling) for scaling in SCALINGS),
    Alibi(),
    T5Bias(buckets=4, max_distance=8),
    T5Bias(buckets=4, max_distance=8, bidirectional=True),
]
CASES = [
    *((mixer, position) for mixer in MIXERS for position in (Rope(), T5Bias(buckets=4, max_distance=8)) if mixer.turned(WIDTH)),
    *((mixer, NoPosition()) for mixer in MIXERS if not mixer.turned(WIDTH)),
    *((Attention(heads=2, mask=mask), Alibi()) for mask in MASKS),
    *((Attention(heads=2, mask=mask, backend="blockwise"), T5Bias(buckets=4, max_distance=8)) for mask in MASKS),
    *((HEADS, position) for position in POSITIONS),
]


def mixing(mixer, position, memory=False):
    """A mixer behind its positions, as a function of their parameters and the stream."""
    import flax.linen as nn

    prefix = jnp.arange(LENGTH)[None] < jnp.asarray([[2], [1]])

    class Mixing(nn.Module):
        """What a stack does with both."""

        @nn.compact
        def __call__(self, x):
            places = Places(segment=SEGMENTS, prefix=prefix)
            x, shared = Positions(position)(x, places.written(LENGTH), unit=1.0, heads=mixer.heads_for_bias)
            mix = mixer.build(position, 1.0, jnp.float64, "mixer")
            if memory:
                return mix(x, Context(places, shared), Memory(jnp.tanh(x)[:, ::-1], Places(segment=SEGMENTS)))
            return mix(x, Context(places, shared))

    return with_parameters(Mixing(), array(ROWS, LENGTH, WIDTH))


@pytest.fixture
def small_blocks(monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, attention_row_block=4, attention_block=4))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mixer, position", CASES, ids=str)
def test_mixers(mixer, position):
    assert_derivative(*mixing(mixer, position))


def test_cross_attention():
    assert_derivative(*mixing(Attention(heads=2, mask=Bidirectional(), bias=True), NoPosition(), memory=True))


def test_latent_attention_in_its_form_for_decoding():
    tree = [array(2, 3, 2, 4), array(2, 3, 2, 2), array(2, 3, 6), array(2, 3, 2), array(6, 2, 4), array(6, 2, 3)]
    assert_derivative(lambda tree: absorbed(*tree, mask=Causal(), scale=0.5), tree)


# ── custom VJPs ──────────────────────────────────────────────────────────────────────────────────────────────────────
SIZES = jnp.asarray([3, 0, 4], jnp.int32)
SOURCE = jnp.asarray([2, 0, 1, 0, 2], jnp.int32)
SLOTS = jnp.asarray([[1, 3], [2, 5], [0, 4]], jnp.int32)
VJPS = {
    "gelu": (gelu, [array(5)]),
    "softmax": (softmax, [array(3, 5)]),
    "product": (product, [array(2, 3, 4), array(4, 5)]),
    "product, long": (product, [array(3, 9), array(9, 2)]),
    "grouped product": (lambda x, w: grouped_products(x, [w], SIZES, block=2)[0][:7], [array(7, 3), array(3, 3, 2)]),
    "grouped products": (
        lambda x, w, v: [y[:7] for y in grouped_products(x, [w, v], SIZES, block=4)],
        [array(8, 3), array(3, 3, 2), array(3, 3, 4)],
    ),
    "exchange": (lambda x: exchange(x, SOURCE, SLOTS), [array(3, 4)]),
}


@pytest.mark.parametrize("function, arguments", VJPS.values(), ids=VJPS)
def test_custom_vjps(function, arguments):
    with jax.enable_x64(True):
        check_grads(function, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
    assert_derivative(lambda tree: function(*tree), arguments)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_attend(backend):
    """Grouped heads, values of another size, documents, a window, a learned bias, a cap and sinks at once."""
    places = Places(segment=SEGMENTS)

    def bias(table, queries, keys):
        return jnp.moveaxis(table[jnp.clip(jnp.abs(queries[:, :, None] - keys[:, None]), 0, 3)], -1, 1)

    def function(tree):
        q, k, v, table, sinks = tree
        given = {"bias": Bias(bias, table), "sinks_H": sinks, "soft_cap": 2.0, "mask": SlidingWindow(4, sinks=1)}
        return attend(q, k, v, queries=places, keys=places, backend=backend, **given)

    assert_derivative(
        function, [array(2, LENGTH, 4, 3), array(2, LENGTH, 2, 3, seed=1), array(2, LENGTH, 2, 5, seed=2), array(4, 4), array(4)]
    )


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────
def base(**changes):
    return override(Decoder(width=WIDTH, depth=2, attention=HEADS), changes)


def pair(**changes):
    tower = Stack(width=WIDTH, depth=1, attention=HEADS, position=T5Bias(buckets=4, max_distance=8))
    encoder = override(tower, {"attention.mask": Bidirectional(), "position.bidirectional": True})
    return override(EncoderDecoder(encoder=encoder, decoder=tower), changes)


MODELS = {
    "post": base(placement="post", norm=RMSNorm()),
    "sandwich": base(placement="sandwich"),
    "parallel": base(placement="parallel"),
    "parallel, one norm": base(placement="parallel_shared", depth=1),
    "hyper-connections": base(residual=HyperConnections(rate=2)),
    "no mixing": base(attention=NoMixing(), position=NoPosition()),
    "no feed-forward": base(ffn=NoFeedForward(), depth=1),
    "dropout": base(dropout=Dropout(0.1, 0.1, 0.1, 0.1, 0.1)),
    "pattern": base(pattern=(Layer(ffn=MoE(4, 2)), Layer(attention=Attention(heads=2, mask=SlidingWindow(3)))), depth=3),
    "factored, typed, normalized embedding": base(embedding=Embed(rank=4, types=2, norm=LayerNorm()), depth=1),
    "untied, capped": base(head=LanguageModel(tied=False, bias=True, soft_cap=3.0, multiplier=0.5, transform="gelu"), depth=1),
    "two tokens ahead": base(head=MultiToken(ahead=2), depth=1),
    "sequence": base(head=SequenceClassifier(labels=3, pooling="mean", transform="tanh"), depth=1),
    "tokens": base(head=TokenClassifier(labels=3), depth=1),
    "number": base(head=Scalar(bias=True), depth=1),
    "encoder": Encoder(width=WIDTH, depth=1, attention=Attention(heads=2, mask=Bidirectional())),
    "encoder and decoder": pair(),
    "with two tables": pair(shared_embedding=False, **{"head.tied": False}),
}
OBJECTIVES = {"two tokens ahead": NextToken(z_loss=0.1, ahead=0.5), "encoder and decoder": Continuation(fraction=0.4)}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    given = check.subject(MODELS[name], OBJECTIVES.get(name), vocabulary=20, length=LENGTH)
    with jax.enable_x64(True):
        model = check.variant(given.model, dropout=True)
        errors = check.derivative_errors(partial(check.loss, given, model), given.params)
    assert max(errors.values()) < check.DERIVATIVE, errors


def classes(value) -> set[str]:
    """Of a configuration and all inside it."""
    if isinstance(value, (tuple, list)):
        return {name for item in value for name in classes(item)}
    if not isinstance(value, Config):
        return set()
    return {type(value).__name__}.union(*(classes(v) for v in vars(value).values()))


def test_every_component_is_in_a_table():
    tables = [NORMS, NETWORKS, list(EXPERTS.values()), RESIDUALS, list(CASES), list(MODELS.values()), list(OBJECTIVES.values())]
    seen = classes(tables)
    for family in (Norm, FeedForward, Router, Dispatch, Residual, Mixer, Mask, Position, Scaling, Head):
        known = {name for name, kind in components(family).items() if kind.__module__.startswith("llm_jax.")}
        assert known <= seen, f"{family.__name__}: {known - seen} is in no table"


# ── the checks themselves ────────────────────────────────────────────────────────────────────────────────────────────
@jax.custom_vjp
def wrong(x):
    return jnp.square(x)


wrong.defvjp(lambda x: (jnp.square(x), x), lambda x, g: (2.001 * g * x,))


def test_a_wrong_vjp_and_a_stopped_gradient_are_found():
    with jax.enable_x64(True):
        tree = {"wrong": array(5), "stopped": array(3), "right": array(4)}
        errors = check.derivative_errors(
            lambda t: wrong(t["wrong"]).sum() + jax.lax.stop_gradient(t["stopped"]).sum() + jnp.sin(t["right"]).sum(), tree
        )
    assert 1e-4 < errors["wrong"] < 1e-3 and errors["stopped"] > 1e-2 and errors["right"] < 1e-8


def found(model, **sizes):
    return {finding.name: finding for finding in check.findings(check.subject(model, **({"length": 8, "vocabulary": 20} | sizes)))}


def test_all_checks_pass():
    every = found(base())
    assert len(every) == 8 and all(f.passed and f.error is not None for f in every.values()), every


def test_a_model_that_sees_ahead_is_not_asked_to_be_causal():
    every = found(MODELS["encoder"])
    assert all(f.passed for f in every.values())
    assert [name for name, f in every.items() if f.error is None] == [
        "no token sees a later one",
        "decoding by the cache = at once",
    ]


def test_a_model_that_says_it_is_causal_and_is_not_is_found():
    class Lying(Bidirectional):
        """Says that it shows no later token."""

        causal = True

    given = check.subject(base(attention=Attention(heads=2, mask=Lying())), length=8, vocabulary=20)
    with jax.enable_x64(True):
        finding = check._causal(given)
    assert not finding.passed and "sees token" in finding.note


def test_choices_that_later_tokens_make_are_found(monkeypatch):
    """No gradient shows them."""
    monkeypatch.setattr(Capacity, "causal", True)
    moe = MoE(4, 2, dispatch=Capacity(factor=0.5))
    given = check.subject(base(ffn=moe), length=16, vocabulary=40)
    with jax.enable_x64(True):
        finding = check._causal(given)
    assert not finding.passed and "change with later ones" in finding.note


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"length": 2}, "length must be at least 4, got 2"),
        ({"vocabulary": 10}, "vocabulary must be at least twice length=8, got 10"),
    ],
)
def test_what_cannot_be_checked_is_a_sentence(sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        found(base(), **sizes)


def test_leaves_are_named_by_their_path():
    assert check.name_of(jax.tree_util.tree_leaves_with_path({"a": [{"b": 1}]})[0][0]) == "a/0/b"
