"""Patterns of layers, encoder and encoder-decoder, heads, what training adds: each against a plainer way to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.core.sharding import unbox
from llm_jax.core.types import Batch, Predictions
from llm_jax.lab.components import (
    LSTM,
    Attention,
    Bidirectional,
    Continuation,
    Decoder,
    Dense,
    Dropout,
    Embed,
    Encoder,
    EncoderDecoder,
    Gated,
    HyperConnections,
    LanguageModel,
    Layer,
    Learned,
    MoE,
    MultiToken,
    NextToken,
    NoFeedForward,
    NoPosition,
    NoResidual,
    Prefix,
    Rope,
    Scalar,
    SequenceClassifier,
    Sigmoid,
    SlidingWindow,
    Stack,
    T5Bias,
    TokenClassifier,
)
from llm_jax.models import count, experts
from llm_jax.models.model import initial_parameters, stack_layers, unstack_layers
from llm_jax.models.predict import predict
from llm_jax.models.stack import smallest_pattern
from tests.quick import QUICK

V, B, L = 11, 2, 8
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, L)).astype(np.int32)
LOCAL = Layer(attention=Attention(heads=2, mask=SlidingWindow(window=3)), position=Rope(theta=100.0))


def small(cls=Decoder, **changes):
    return override(cls(width=16, depth=2), {"attention.heads": 2} | changes)


def initial(model, *inputs):
    """Unrolled parameters away from their starting points, laid out as the model takes them."""
    plain = model.with_layers("unrolled")
    params = unbox(plain.build(V).init(jax.random.key(0), *(inputs or (TOKENS,))))["params"]
    return stack_layers(jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params), model)


def run(model, params, *inputs, **given):
    return model.build(V).apply({"params": params}, *(inputs or (TOKENS,)), **given)


# ── patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────
PATTERNS = [
    {"depth": 3, "first": (Layer(ffn=Gated()),)},
    {"depth": 6, "pattern": (LOCAL, LOCAL, Layer())},
    {"depth": 6, "first": (Layer(ffn=Gated()),), "pattern": (LOCAL, Layer(ffn=MoE(experts=4)))},
    {"depth": 2, "first": (LOCAL, Layer())},
    {"depth": 4, "residual": HyperConnections(rate=3)},
]


@pytest.mark.parametrize("changes", PATTERNS, ids=lambda c: ",".join(c))
def test_scanned_patterns_equal_unrolled_ones(changes):
    scanned, unrolled = (small(layers=layers, **changes) for layers in ("scanned", "unrolled"))
    params = initial(unrolled)
    stacked = stack_layers(params, scanned)
    np.testing.assert_allclose(run(scanned, stacked), run(unrolled, params), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked, scanned), params)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count.parameters(scanned, V)


def test_layers_differ_where_the_pattern_says():
    """A window of 3 in both layers reaches 4 tokens back; with the second one global, the whole row."""
    for pattern, reach in (((LOCAL,), 4), ((LOCAL, Layer()), 7)):
        model = small(pattern=pattern)
        params, changed = initial(model), TOKENS.copy()
        changed[:, 0] = (changed[:, 0] + 1) % V
        moved = np.abs(run(model, params) - run(model, params, changed)).max((0, 2)) > 1e-6
        assert moved.sum() == reach + 1


def test_layers_one_by_one_become_the_shortest_pattern():
    local, plain, dense = LOCAL, Layer(), Layer(ffn=Gated())
    assert smallest_pattern([plain] * 4) == ((), ())
    assert smallest_pattern([local, local, plain] * 2 + [local]) == ((), (local, local, plain))
    assert smallest_pattern([dense, *[plain] * 5]) == ((dense,), ())
    assert smallest_pattern([dense, local, plain, local, plain]) == ((dense,), (local, plain))


# ── encoder, encoder-decoder ─────────────────────────────────────────────────────────────────────────────────────────
def test_an_encoder_sees_both_ways_and_no_padding():
    model = small(Encoder)
    params, changed = initial(model), TOKENS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % V
    assert (np.abs(run(model, params) - run(model, params, changed)).max((0, 2)) > 1e-6).all()
    segments = np.where(np.arange(L) < 6, 0, -1)[None].repeat(B, 0)
    padded = [run(model, params, tokens, None, segments)[:, :6] for tokens in (TOKENS, changed)]
    np.testing.assert_array_equal(*padded)
    np.testing.assert_allclose(padded[0], run(model, params, TOKENS[:, :6]), atol=1e-5)


def pair(**changes):
    encoder = Stack(width=16, depth=2, attention=Attention(heads=2, mask=Bidirectional()), position=T5Bias(bidirectional=True))
    decoder = Stack(width=16, depth=3, attention=Attention(heads=2), position=T5Bias())
    return override(EncoderDecoder(encoder=encoder, decoder=decoder), changes)


@pytest.mark.parametrize("layers", [pytest.param("unrolled", marks=pytest.mark.slow), "scanned"])
@pytest.mark.parametrize("shared", [True, False])
def test_an_encoder_decoder_reads_all_inputs_and_earlier_targets(layers, shared):
    model = pair(shared_embedding=shared, **{"encoder.layers": layers, "decoder.layers": layers})
    inputs, targets = TOKENS[:, :5], TOKENS[:, 3:]
    params = initial(model, inputs, targets)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count.parameters(model, V)
    before, later, other = run(model, params, inputs, targets), targets.copy(), inputs.copy()
    later[:, 3], other[:, 4] = (later[:, 3] + 1) % V, (other[:, 4] + 1) % V
    moved = np.abs(run(model, params, inputs, later) - before).max((0, 2))
    np.testing.assert_array_equal(moved[:3], 0)
    assert (np.abs(run(model, params, other, targets) - before).max((0, 2)) > 1e-6).all()
    segments = np.array([[0, 0, 0, 0, -1]] * B, np.int32)
    padded = [run(model, params, x, targets, input_segments_BM=segments) for x in (inputs, other)]
    np.testing.assert_array_equal(*padded)
    np.testing.assert_allclose(padded[0], run(model, params, inputs[:, :4], targets), atol=1e-5)


def test_packed_pairs_are_as_if_alone():
    """Inputs and targets of two documents in one row, with positions of the row's where none are given."""
    learned = {f"{tower}.position": Learned(max_length=L) for tower in ("encoder", "decoder")}
    model = pair(**learned, **{"encoder.depth": 1, "decoder.depth": 1})
    params = initial(model, TOKENS, TOKENS)
    inputs, targets = TOKENS[:1, :7], TOKENS[1:, :5]
    ends = (range(4), range(3)), (range(2), range(3))
    places, documents = ([np.array([[*f(a, 0), *f(b, 1)]]) for a, b in ends] for f in (lambda r, _: r, lambda r, n: [n] * len(r)))
    batch = Batch(
        targets, targets, segments=documents[1], positions=places[1], inputs=inputs, input_segments=documents[0],
        input_positions=places[0],
    )  # fmt: skip
    given, named = model.arguments(batch)
    apart = [run(model, params, inputs[:, :4], targets[:, :2]), run(model, params, inputs[:, 4:], targets[:, 2:])]
    np.testing.assert_allclose(run(model, params, *given, **named), np.concatenate(apart, 1), atol=2e-5)


def test_what_is_continued_has_positions_from_where_it_goes_on():
    segments, positions = np.array([[0] * 6 + [1] * 2]), np.array([[*range(6), *range(2)]])
    seen = []

    def apply(params, batch, rng):
        seen.append(batch)
        return Predictions(jnp.zeros((*batch.tokens.shape, V)))

    batch = Batch(TOKENS[:1], TOKENS[:1], segments=segments, positions=positions)
    given = {"model": pair(), "rng": None, "byte_lengths": jnp.ones(V, jnp.int32), "train": False}
    Continuation(fraction=0.5).loss(apply, None, batch, **given)
    assert seen[0].input_positions.tolist() == [[0, 1, 2, 3]] and seen[0].input_segments.tolist() == [[0] * 4]
    assert seen[0].positions.tolist() == [[0, 1, 2, 0, 1]] and seen[0].segments.tolist() == [[0, 0, 0, 1, 1]]


def test_what_an_encoder_decoder_cannot_be():
    with pytest.raises(ConfigError, match=r"encoder.width must be decoder.width=16, got 32"):
        pair(**{"encoder.width": 32})
    with pytest.raises(ConfigError, match=r"decoder.placement cannot be parallel with cross-attention"):
        pair(**{"decoder.placement": "parallel"})
    with pytest.raises(ConfigError, match=r"cross must be given where the decoder mixes by LSTM"):
        pair(**{"decoder.attention": LSTM(), "decoder.position": NoPosition()})


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def hidden(model, params, *given):
    return model.build(V).apply({"params": params}, TOKENS, *given, mutable=["intermediates"])[1]["intermediates"]["hidden"][0]


def test_heads_read_the_last_layer():
    right, left = ([[0] * 8, [0] * 5 + [-1] * 3], [[-1] * 2 + [0] * 6, [0] * 8])
    for pooling, segments, rows in (
        ("first", right, [0, 0]),
        ("first", left, [2, 0]),
        ("last", right, [7, 4]),
        ("last", left, [7, 7]),
    ):
        model = small(head=SequenceClassifier(labels=3, pooling=pooling))
        params = initial(model)
        segments = np.array(segments, np.int32)
        x = hidden(model, params, None, segments)[np.arange(B), rows]
        expected = x @ params["head"]["labels"]["kernel"] + params["head"]["labels"]["bias"][None]
        np.testing.assert_allclose(run(model, params, TOKENS, None, segments), expected, atol=1e-5)
    segments = np.array(right, np.int32)
    model = small(head=SequenceClassifier(labels=3, pooling="mean", transform="tanh"))
    params = initial(model)
    x = np.stack([hidden(model, params)[0].mean(0), hidden(model, params)[1, :5].mean(0)])
    x = np.tanh(x @ params["head"]["transform"]["kernel"] + params["head"]["transform"]["bias"][None])
    expected = x @ params["head"]["labels"]["kernel"] + params["head"]["labels"]["bias"][None]
    np.testing.assert_allclose(run(model, params, TOKENS, None, segments), expected, atol=1e-5)
    for head, shape in ((TokenClassifier(labels=4), (B, L, 4)), (Scalar(bias=True), (B, L))):
        model = small(head=head)
        params = initial(model)
        (linear,) = params["head"].values()
        expected = (hidden(model, params) @ linear["kernel"] + linear["bias"][None, None]).reshape(shape)
        np.testing.assert_allclose(run(model, params), expected, atol=1e-5)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count.parameters(model, V)


def test_logits_are_transformed_scaled_biased_and_capped():
    head = LanguageModel(tied=False, bias=True, multiplier=0.5, soft_cap=3.0, transform="gelu")
    model = small(head=head)
    params = initial(model)
    p = params["head"]
    x = jax.nn.gelu(hidden(model, params) @ p["transform"]["kernel"] + p["transform"]["bias"][None, None], approximate=False)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * p["transform_norm"]["scale"][None, None] + p["transform_norm"]["bias"][None, None]
    raw = 0.5 * (x @ p["words"]["kernel"] + p["bias"][None, None])
    np.testing.assert_allclose(run(model, params), 3 * np.tanh(raw / 3), atol=1e-5)


def test_a_factored_table_is_the_product():
    model = small(embedding=Embed(rank=4, scaled=False))
    params = initial(model)
    table = params["embedding"]["embedding"] @ params["embedding"]["projection"]["kernel"]
    whole = small(embedding=Embed(scaled=False))
    np.testing.assert_allclose(run(model, params), run(whole, params | {"embedding": {"embedding": table}}), atol=1e-5)


def test_later_tokens_are_predicted_from_their_own_past():
    """The logits of two ahead see tokens up to the next one, and equal the equations (DeepSeek-V3 2024, eq. 21-23)."""
    model = small(head=MultiToken(ahead=2))
    params = initial(model)
    network = model.build(V)
    _, sown = network.apply({"params": params}, TOKENS, mutable=["ahead"])
    ahead = sown["ahead"]["head"]
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % V
    _, after = network.apply({"params": params}, changed, mutable=["ahead"])
    for step in (1, 2):
        moved = np.abs(after["ahead"]["head"][f"logits_{step}"] - ahead[f"logits_{step}"]).max((0, 2))
        np.testing.assert_array_equal(moved[: 5 - step], 0)
        assert (moved[5 - step :] > 1e-6).all()
    np.testing.assert_array_equal(run(model, params), network.apply({"params": params}, TOKENS, mutable=["ahead"])[0])


def test_the_loss_of_later_tokens_counts_those_in_the_document():
    model, objective = small(head=MultiToken(ahead=2)), NextToken(ahead=0.5)
    params = initial(model)
    targets = np.roll(TOKENS, -1, 1)
    segments = np.array([[0] * 5 + [1] * 3, [0] * 8], np.int32)
    batch = Batch(TOKENS, targets, segments=segments)
    said = predict(model, V, params, batch, jax.random.key(0), train=True)
    given = {"model": model, "rng": jax.random.key(0), "byte_lengths": jnp.ones(V, jnp.int32), "train": True}
    loss, _ = objective.loss(lambda p, b, r: predict(model, V, p, b, r, train=True), params, batch, **given)
    expected = 0.0
    for k, logits in enumerate((said.logits, *said.ahead)):
        logp = jax.nn.log_softmax(logits, -1)
        for b in range(B):
            for i in range(L):
                if k == 0 or (i + k < L and segments[b, i + k] == segments[b, i]):
                    expected -= float(logp[b, i, targets[b, i + k if k else i]]) * (1 if k == 0 else 0.5 / 2)
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)


def test_no_later_token_that_counts_has_been_seen():
    """A place of the prefix is seen from everywhere, and with it the later token that a layer ahead has put there."""
    model, cut = small(head=MultiToken(ahead=2), attention=Attention(heads=2, mask=Prefix())), 4
    params, network, objective = initial(model), model.build(V), Continuation(fraction=cut / L)
    prefix = np.broadcast_to(np.arange(L)[None] < cut, (B, L))

    def ahead(tokens):
        sown = network.apply({"params": params}, tokens, prefix_BL=prefix, mutable=["ahead"])[1]["ahead"]["head"]
        return [sown["logits_1"], sown["logits_2"]]

    def loss(later):
        said = Predictions(jnp.zeros((B, L, V)), tuple(later))
        given = {"model": model, "rng": None, "byte_lengths": jnp.ones(V, jnp.int32), "train": True}
        return objective.loss(lambda *_: said, params, Batch(TOKENS, np.roll(TOKENS, -1, 1)), **given)[0].total

    before = ahead(TOKENS)
    for step, counts in enumerate(jax.grad(loss)(before), 1):
        places = np.flatnonzero(np.abs(counts).max((0, 2)))
        np.testing.assert_array_equal(places, np.arange(cut - 1, L - step))
        for place in set(places) & set(range(L - step - 1)):
            changed = TOKENS.copy()
            changed[:, place + step + 1] = (changed[:, place + step + 1] + 1) % V
            np.testing.assert_array_equal(ahead(changed)[step - 1][:, place], before[step - 1][:, place])


# ── what training adds ───────────────────────────────────────────────────────────────────────────────────────────────
def test_whole_branches_are_dropped_a_sequence_at_a_time():
    model = small(depth=1, ffn=NoFeedForward(), dropout=Dropout(layer=0.5))
    params = initial(model)
    embedded = run(small(depth=1, ffn=NoFeedForward(), residual=NoResidual()), params)
    rows = np.repeat(TOKENS[:1], 64, 0)
    outputs = model.build(V).apply({"params": params}, rows, deterministic=False, rngs={"dropout": jax.random.key(1)})
    kinds = np.unique(np.round(np.asarray(outputs).reshape(64, -1), 4), axis=0)
    assert len(kinds) == 2 and embedded.shape == (B, L, V)
    dropped = (np.abs(np.asarray(outputs) - np.asarray(outputs)[0]).max((1, 2)) < 1e-6).mean()
    assert 0.25 < dropped < 0.75
    with pytest.raises(ConfigError, match=r"dropout.layer drops whole branches"):
        small(residual=NoResidual(), dropout=Dropout(layer=0.5))


def test_experts_add_their_losses_and_move_their_biases():
    router = Sigmoid(bias=True, bias_rate=0.1)
    for layers in ("unrolled", "scanned"):
        model = small(ffn=MoE(experts=4, active=2, balance=0.5, z_loss=0.25, router=router), depth=3, layers=layers)
        params = initial(model)
        said = predict(model, V, params, Batch(TOKENS, TOKENS), jax.random.key(0), train=True)
        settled, metrics = experts.settle(model, params, said.routing)
        paths = experts.expert_layers(model)
        assert len(paths) == (1 if layers == "scanned" else 3)
        total = 0.0
        for path in paths:
            sown = said.routing[path[0]] if layers == "unrolled" else said.routing["layers"]["step_0"]
            before, after = (tree[path[0]] if layers == "unrolled" else tree["layers"]["step_0"] for tree in (params, settled))
            load = np.asarray(sown["ffn"]["load"])
            step = after["ffn"]["router"]["bias"] - before["ffn"]["router"]["bias"]
            np.testing.assert_allclose(step, 0.1 * np.sign(load.mean(-1, keepdims=True) - load), atol=1e-6)
            assert load.sum() == B * L * 2 * (3 if layers == "scanned" else 1)
            total += float(0.5 * sown["ffn"]["balance"].total.sum() + 0.25 * sown["ffn"]["z_loss"].total.sum())
        np.testing.assert_allclose(said.penalty.total, total, rtol=1e-5)
        assert float(said.penalty.weight) == B * L
        assert 1 <= float(metrics["moe/max_load"].mean) <= 2 and float(metrics["moe/dropped"].mean) == 0


def test_experts_of_a_head_that_looks_ahead_are_balanced_too():
    """Its layer is one more: its choices are counted, its bias moves, and the auxiliary loss reaches its router."""
    moe = MoE(experts=4, balance=5.0, router=Sigmoid(bias=True, bias_rate=0.1))
    model = small(ffn=moe, depth=1, head=MultiToken(ahead=1))
    params, batch, key = initial(model), Batch(TOKENS, TOKENS), jax.random.key(0)
    assert list(experts.expert_layers(model)) == [("layers_0", "ffn"), ("head", "ahead_1", "block", "ffn")]

    def penalty(params):
        said = predict(model, V, params, batch, key, train=True)
        return said.penalty.mean, said.routing

    step = jax.jit(jax.grad(penalty, has_aux=True), compiler_options=QUICK)
    grads, routing = step(params)
    settled, metrics = experts.settle(model, params, routing)
    grad, sown, before, after = (tree["head"]["ahead_1"]["block"]["ffn"] for tree in (grads, routing, params, settled))
    assert np.abs(grad["router"]["kernel"]).max() > 1e-4
    moved = after["router"]["bias"] - before["router"]["bias"]
    np.testing.assert_allclose(moved, 0.1 * np.sign(sown["load"].mean() - sown["load"]), atol=1e-6)
    assert np.abs(moved).max() > 0
    loads = routing["layers_0"]["ffn"]["load"], sown["load"]
    np.testing.assert_allclose(metrics["moe/max_load"].mean, np.mean([load.max() / load.mean() for load in loads]), rtol=1e-6)


def test_a_decoder_and_an_encoder_decoder_continue_the_same_tokens():
    """Continuation scores the targets after the given part, whichever model reads it."""
    objective, targets = Continuation(fraction=0.5), np.roll(TOKENS, -1, 1)
    given = {"rng": jax.random.key(0), "byte_lengths": jnp.ones(V, jnp.int32), "train": False}
    for model in (small(), small(attention=Attention(heads=2, mask=Prefix())), pair()):
        params = initial(model) if isinstance(model, Decoder) else initial(model, TOKENS, TOKENS)
        seen = []

        def apply(params, batch, rng, model=model, seen=seen):
            seen.append(batch)
            return predict(model, V, params, batch, rng, train=False)

        loss, _ = objective.loss(apply, params, Batch(TOKENS, targets), model=model, **given)
        logits = predict(model, V, params, seen[0], jax.random.key(0), train=False).logits[:, -5:]
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, -1)), targets[:, 3:, None], -1)
        assert float(loss.weight) == B * 5
        np.testing.assert_allclose(loss.total, nll.sum(), rtol=1e-5)


def test_a_prefix_is_seen_from_everywhere():
    model = small(attention=Attention(heads=2, mask=Prefix()), position=Learned(max_length=L))
    params, changed = initial(model), TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % V
    prefix = np.broadcast_to(np.arange(L)[None] < 4, (B, L))
    before, after = (run(model, params, tokens, prefix_BL=prefix) for tokens in (TOKENS, changed))
    assert (np.abs(before - after).max((0, 2)) > 1e-6).all()
    later = TOKENS.copy()
    later[:, 5] = (later[:, 5] + 1) % V
    moved = np.abs(run(model, params, later, prefix_BL=prefix) - before).max((0, 2))
    np.testing.assert_array_equal(moved[:5], 0)


@pytest.mark.parametrize("placement", ["parallel", "parallel_shared"])
def test_parallel_branches_read_the_same_stream(placement):
    model = small(placement=placement, depth=1, ffn=Dense(activation="identity"))
    params = initial(model)
    layer, alone = params["layers_0"], small(placement="pre", depth=1, ffn=NoFeedForward())
    _, sown = model.build(V).apply({"params": params}, TOKENS, mutable=["intermediates"])
    x, out = sown["intermediates"]["stream"][0], sown["intermediates"]["layers_0"]["stream"][0]
    given = {**params, "layers_0": {"attention": layer["attention"], "norm_attention": layer["norm_attention"]}}
    after_attention = alone.build(V).apply({"params": given}, TOKENS, mutable=["intermediates"])[1]["intermediates"]["layers_0"][
        "stream"
    ][0]
    norm = layer["norm_ffn" if placement == "parallel" else "norm_attention"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * norm["scale"][None, None] + norm["bias"][None, None]
    ffn = normed @ layer["ffn"]["up"]["kernel"] @ layer["ffn"]["down"]["kernel"]
    np.testing.assert_allclose(out, after_attention + ffn, atol=1e-4)


@pytest.mark.slow
def test_initial_parameters_of_two_stacks_are_alike_however_they_are_laid_out():
    models = [pair(**{"encoder.layers": layers, "decoder.layers": layers}) for layers in ("unrolled", "scanned")]
    plain, scanned = (initial_parameters(model, V, jax.random.key(0)) for model in models)
    jax.tree.map(np.testing.assert_array_equal, plain, unstack_layers(scanned, models[1]))
