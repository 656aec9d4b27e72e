"""Numbers of an inspection against a network written a second time in NumPy's float64, finite differences, and closed forms."""

import functools
import math
import pathlib
import re
import struct
from dataclasses import replace
from html import escape

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, log_softmax, softmax

import llm_jax
from llm_jax import LM
from llm_jax.core.config import ConfigError
from llm_jax.core.sharding import unbox
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import Bytes, Fitted
from llm_jax.lab import Ablation, Arms, Experiment
from llm_jax.lab.experiment import Checkpoints, Evaluation
from llm_jax.lab.inspection import Subject, embeddings, positions, sequence, subject
from llm_jax.lab.inspection.attention import Map, attention_maps, head_numbers
from llm_jax.lab.inspection.depth import by_depth, parameter_gradients, stream_gradients, stream_sizes
from llm_jax.lab.inspection.drawing import png, pooled, thinned
from llm_jax.lab.inspection.figures import heads, lens_maps, lens_table, overview
from llm_jax.lab.inspection.lens import Lens, logit_lens
from llm_jax.lab.runner import Runner
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import SequenceClassifier
from llm_jax.models.intervention import observed
from llm_jax.models.model import abstract_parameters
from llm_jax.models.stack import Stack
from llm_jax.nn import latent, multihead
from llm_jax.nn.attention import Bidirectional, SlidingWindow, attend
from llm_jax.nn.embedding import Embedding, neighbour_purity
from llm_jax.nn.latent import MLA
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias
from llm_jax.nn.recurrent import LSTM
from llm_jax.nn.residual import HyperConnections
from llm_jax.nn.rope import LinearScaling, YarnScaling
from llm_jax.train.pretrain import Train

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"
VOCABULARY, TOKENS = 11, (3, 1, 4, 1, 5, 9)


def random_parameters(model, seed=0, vocabulary=VOCABULARY):
    draw = np.random.default_rng(seed)
    shapes = unbox(abstract_parameters(model, vocabulary))
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.5, jnp.float32), shapes)


# ── the same network a second time, in float64 ───────────────────────────────────────────────────────────────────────
SMALL = Decoder(width=4, depth=2, attention=Attention(heads=2), position=Alibi(), layers="scanned")


def normalized(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


class ByHand:
    """`SMALL` for one row. offsets: depth → `[L, D]` added to the stream there."""

    def __init__(self, params, tokens, offsets=None):
        offsets = offsets or {}
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        table = p["embedding"]["embedding"]
        x = table[list(tokens)] * 2.0  # √width
        self.streams, self.weights = [x + offsets.get(0, 0)], []
        places = np.arange(len(tokens))
        apart = places[:, None] - places[None]
        for depth in range(2):
            layer = jax.tree.map(lambda leaf, d=depth: leaf[d], p["layers"]["step_0"])
            x = self.streams[-1]
            h, a = normalized(x, layer["norm_attention"]), layer["attention"]
            q, k, v = (np.einsum("ld,dhk->lhk", h, a[name]["kernel"]) for name in ("query", "key", "value"))
            slopes = np.array([2.0**-4, 2.0**-8])
            scores = np.einsum("lhk,mhk->hlm", q, k) / math.sqrt(2) - slopes[:, None, None] * apart
            self.weights.append(softmax(np.where(apart >= 0, scores, -np.inf), -1))
            x = x + np.einsum("hlm,mhk,hkd->ld", self.weights[-1], v, a["output"]["kernel"])
            up = normalized(x, layer["norm_ffn"]) @ layer["ffn"]["up"]["kernel"]
            x = x + (up * (1 + erf(up / math.sqrt(2))) / 2) @ layer["ffn"]["down"]["kernel"]
            self.streams.append(x + offsets.get(depth + 1, 0))
        self.norm, self.table = p["final_norm"], table
        self.logits = self.read(self.streams[-1])

    def read(self, x):
        return normalized(x, self.norm) @ self.table.T

    def loss(self, targets):
        return -log_softmax(self.logits, -1)[range(len(targets)), list(targets)].mean()


@functools.cache
def small():
    params = random_parameters(SMALL)
    return params, sequence(SMALL, TOKENS), ByHand(params, TOKENS)


def loss_by_hand(params, offsets=None):
    """Of the next token, where there is one."""
    found = ByHand(params, TOKENS, offsets)
    return -log_softmax(found.logits[:-1], -1)[range(len(TOKENS) - 1), list(TOKENS[1:])].mean()


def test_attention_maps_are_the_softmax_of_queries_and_keys_by_hand():
    params, batch, hand = small()
    maps = attention_maps(SMALL, VOCABULARY, params, batch)
    assert [(found.stack, found.layer, found.kind) for found in maps] == [("", 0, "self"), ("", 1, "self")]
    for found, weights in zip(maps, hand.weights, strict=True):
        np.testing.assert_allclose(found.weights[0], weights, atol=2e-6)


def test_the_lens_reads_every_depth_by_hand():
    params, batch, hand = small()
    found = logit_lens(SMALL, VOCABULARY, params, batch, top=3)
    final, right = log_softmax(hand.logits, -1), np.roll(TOKENS, -1)
    for depth, x in enumerate(hand.streams):
        log_p = log_softmax(hand.read(x), -1)
        np.testing.assert_array_equal(found.ids[depth, 0], np.argsort(-log_p, -1)[:, :3])
        np.testing.assert_allclose(found.probabilities[depth, 0], -np.sort(-np.exp(log_p), -1)[:, :3], atol=2e-5)
        np.testing.assert_allclose(found.entropy[depth, 0], -(np.exp(log_p) * log_p).sum(-1) / math.log(2), atol=1e-4)
        np.testing.assert_allclose(found.divergence[depth, 0], (np.exp(final) * (final - log_p)).sum(-1) / math.log(2), atol=1e-4)
        own = log_p[range(len(TOKENS)), right]
        np.testing.assert_allclose(found.right_probability[depth, 0], np.exp(own), atol=2e-5)
        np.testing.assert_array_equal(found.right_rank[depth, 0], (log_p > own[:, None]).sum(-1))
    assert (found.right_rank[-1] > 0).any()


def test_sizes_and_gradients_of_the_stream_are_those_of_finite_differences():
    params, batch, hand = small()
    sizes = stream_sizes(SMALL, VOCABULARY, params, batch)[""]
    np.testing.assert_allclose(sizes[:, 0], [np.sqrt((x**2).mean(-1)) for x in hand.streams], rtol=1e-4)
    gradients, found = stream_gradients(SMALL, VOCABULARY, params, batch)[""], by_depth(SMALL, VOCABULARY, params, batch)[""]
    for depth in range(3):
        expected = np.zeros((len(TOKENS), 4))
        for where in np.ndindex(expected.shape):
            step = np.zeros_like(expected)
            step[where] = 1e-5
            expected[where] = (loss_by_hand(params, {depth: step}) - loss_by_hand(params, {depth: -step})) / 2e-5
        np.testing.assert_allclose(gradients[depth][0], expected, atol=2e-6)
        assert found.gradient[depth] == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    np.testing.assert_array_equal(found.stream, sizes)


def test_gradients_by_parameters_are_those_of_finite_differences():
    params, batch, _ = small()
    leaves, tree = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    values = [leaf for _, leaf in leaves]
    squares = {}
    for number, (path, leaf) in enumerate(leaves):
        names = [key.key for key in path]
        for where in np.ndindex(leaf.shape):
            loss = []
            for sign in (1, -1):
                moved = leaf.copy()
                moved[where] += sign * 1e-5
                loss.append(loss_by_hand(jax.tree.unflatten(tree, [*values[:number], moved, *values[number + 1 :]])))
            place = f"layers_{where[0]}" if names[0] == "layers" else names[0]
            part = {"attention": "attention", "ffn": "ffn"}[names[2].removeprefix("norm_")] if names[0] == "layers" else "all"
            squares[place, part] = squares.get((place, part), 0) + ((loss[0] - loss[1]) / 2e-5) ** 2
    found = parameter_gradients(SMALL, VOCABULARY, params, batch)
    assert list(found) == ["embedding", "layers_0", "layers_1", "final_norm"]
    flat = {(place, part): value for place, row in found.items() for part, value in row.items()}
    assert flat.keys() == squares.keys()
    for key, value in flat.items():
        assert value == pytest.approx(math.sqrt(squares[key]), rel=1e-3), key


# ── every kind of model ──────────────────────────────────────────────────────────────────────────────────────────────
TINY = {"width": 8, "depth": 1}
LATENT = MLA(heads=2, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=3)
KINDS = {
    "grouped": Decoder(**TINY, attention=Attention(heads=4, kv_heads=2), position=Rope()),
    "sinks, cap, window": Decoder(**TINY, attention=Attention(heads=2, sinks=True, soft_cap=2.0, mask=SlidingWindow(window=3))),
    "scaled": Decoder(**TINY, attention=Attention(heads=2, scale=0.3, bias=True), placement="parallel"),
    "latent": Decoder(**TINY, attention=LATENT, position=Rope(scaling=YarnScaling(mscale=1.0, mscale_all_dim=2.0))),
    "latent, biased": Decoder(**TINY, attention=replace(LATENT, scale=0.3), position=Alibi()),
    "copies": Decoder(**TINY, attention=Attention(heads=2), residual=HyperConnections(rate=2)),
    "pattern": Decoder(
        width=8,
        depth=3,
        attention=Attention(heads=2),
        position=T5Bias(buckets=6, max_distance=8),
        pattern=(Layer(attention=LSTM()), Layer(attention=Attention(heads=2, mask=SlidingWindow(window=2)), position=Rope())),
        first=(Layer(),),
    ),
    "encoder": Encoder(**TINY, attention=Attention(heads=2, mask=Bidirectional()), position=Learned(max_length=8)),
    "encoder-decoder": EncoderDecoder(
        encoder=Stack(**TINY, attention=Attention(heads=2, mask=Bidirectional()), position=T5Bias(buckets=8, bidirectional=True)),
        decoder=Stack(**TINY, attention=Attention(heads=2), position=T5Bias(buckets=8)),
    ),
}


def read(model, tokens=TOKENS):
    return sequence(model, tokens, inputs=(2, 7, 7, 8) if model.encodes else None)


@pytest.mark.parametrize("name", KINDS)
def test_maps_times_values_are_what_attention_says(name, monkeypatch):
    """Whatever the layer was told: bias, cap, scale, sinks, mask, documents, and whose keys."""
    model, calls = KINDS[name], []
    params, batch = random_parameters(model), read(model)
    if name in ("grouped", "encoder-decoder"):  # two documents
        inputs = None if batch.inputs is None else jnp.array([[0, 1, 1, 1]])
        batch = replace(batch, segments=jnp.array([[0, 0, 0, 0, 1, 1]]), input_segments=inputs)

    def recorded(q, k, v, **given):
        calls.append((v, attend(q, k, v, **given)))
        return calls[-1][1]

    def spied(params, batch):
        observed(model, VOCABULARY, params, batch)
        return calls

    maps = attention_maps(model, VOCABULARY, params, batch)
    for module in (multihead, latent):
        monkeypatch.setattr(module, "attend", recorded)
    calls = jax.jit(spied)(params, batch)
    kinds = {"encoder-decoder": [("encoder", 0, "self"), ("decoder", 0, "self"), ("decoder", 0, "cross")], "pattern": None}
    layers = [("", 0, "self"), ("", 2, "self")] if name == "pattern" else kinds.get(name, [("", 0, "self")])
    assert [(found.stack, found.layer, found.kind) for found in maps] == layers and len(calls) == len(layers)
    for found, (v_BMGV, out_BLHV) in zip(maps, calls, strict=True):
        v_BMHV = np.repeat(v_BMGV, found.weights.shape[1] // v_BMGV.shape[2], 2)
        np.testing.assert_allclose(np.einsum("bhlm,bmhv->blhv", found.weights, v_BMHV), out_BLHV, atol=2e-6)
    assert ("sinks" in name) == bool((maps[0].weights.sum(-1) < 0.999).any())


@pytest.mark.parametrize("name", KINDS)
def test_the_deepest_lens_is_the_model(name):
    model = KINDS[name]
    params, batch = random_parameters(model), read(model)
    found = logit_lens(model, VOCABULARY, params, batch, top=VOCABULARY)
    inputs, given = model.arguments(batch)
    network = jax.jit(lambda p: model.build(VOCABULARY).apply({"params": p}, *inputs, **given))
    expected = softmax(np.asarray(network(params), np.float64), -1)
    assert len(found.ids) == model.final.depth + 1
    np.testing.assert_allclose(found.probabilities[-1], -np.sort(-expected, -1), atol=1e-5)
    np.testing.assert_allclose(found.divergence[-1], 0, atol=1e-6)


def test_a_sequence_says_what_is_right_at_each_place():
    causal, whole, both = (
        sequence(KINDS[name], [5, 6, 7], **more)
        for name, more in {"grouped": {}, "encoder": {}, "encoder-decoder": {"inputs": [8, 9], "start": 4}}.items()
    )
    assert causal.tokens.tolist() == [[5, 6, 7]] and causal.targets[0, :2].tolist() == [6, 7]
    assert causal.weights.tolist() == [[1, 1, 0]]
    assert whole.targets.tolist() == whole.tokens.tolist() == [[5, 6, 7]] and whole.weights is None
    assert both.tokens.tolist() == [[4, 5, 6]] and both.targets.tolist() == [[5, 6, 7]] and both.inputs.tolist() == [[8, 9]]
    with pytest.raises(ConfigError, match="inputs must be given"):
        sequence(KINDS["encoder-decoder"], [5])
    with pytest.raises(ConfigError, match="tokens must have at least one"):
        sequence(KINDS["grouped"], [])


def test_numbers_of_heads_are_those_of_maps_that_are_known():
    weights = np.zeros((1, 3, 4, 4))
    weights[0, 0] = np.eye(4, k=-1)  # one to the left; the first row sees nothing
    weights[0, 1] = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    weights[0, 2, :, 0] = 0.5  # and a sink that takes the other half
    found = head_numbers(Map("", 0, "self", weights))
    np.testing.assert_allclose(found.entropy, [0, np.mean(np.log2([1, 2, 3, 4])), 1], atol=1e-9)
    np.testing.assert_allclose(found.distance, [1, np.mean([0, 0.5, 1, 1.5]), 1.5])
    np.testing.assert_allclose(found.first, [1 / 3, np.mean([1, 1 / 2, 1 / 3, 1 / 4]), 0.5])
    np.testing.assert_allclose(found.sink, [0, 0, 0.5])
    assert np.isnan(head_numbers(Map("decoder", 0, "cross", weights)).distance).all()


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_planted_neighbours_and_analogies_are_found():
    draw = np.random.default_rng(0)
    table = draw.normal(size=(30, 16))
    table[7] = 3 * table[4] + 0.01 * draw.normal(size=16)  # the direction counts, not the length
    table[9] = table[4] + 0.5 * draw.normal(size=16)
    near = embeddings.neighbours(table, [4], count=3)
    cosine = table @ table[4] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[4])
    assert near.ids[0, :2].tolist() == [7, 9] and 4 not in near.ids
    np.testing.assert_allclose(near.cosines[0], cosine[near.ids[0]])
    royal, male, female = np.eye(16)[:3]
    man, woman, king, queen = 20, 21, 22, 23
    table[[man, woman, king, queen]] = [male, female, (male + royal) * 5, (female + royal) * 0.2]
    assert embeddings.analogy(table, man, king, woman, count=1).ids.tolist() == [queen]
    assert embeddings.analogy_rank(table, man, king, woman, queen) == 0
    given = embeddings.analogy(table, man, king, woman, count=99)
    assert len(given.ids) == 27 and not {man, king, woman} & set(given.ids.tolist())
    assert embeddings.analogy_rank(table, man, king, woman, int(given.ids[5])) == 5
    with pytest.raises(ConfigError, match="asks for one of its own words"):
        embeddings.analogy_rank(table, man, king, woman, king)
    with pytest.raises(ConfigError, match="a token id is 30, but there are only 0 … 29"):
        embeddings.neighbours(table, [30])


def test_isotropy_has_its_closed_forms():
    cross = np.concatenate([np.eye(5), -np.eye(5)]) * 0.7
    found = embeddings.isotropy(np.concatenate([cross, np.zeros((2, 5))]))  # rows of zeros have no direction
    assert found.partition == pytest.approx(1) and found.rank == pytest.approx(5) and found.norm == pytest.approx(0.7)
    assert found.cosine == pytest.approx(-10 / 90)  # each row has one opposite
    lengths, along = np.array([0.5, 1.0, 2.0]), np.array([3, 0, 4]) / 5
    line = embeddings.isotropy(lengths[:, None] * along)
    z = [np.exp(lengths).sum(), np.exp(-lengths).sum(), 3.0]  # along, against, across
    assert line.partition == pytest.approx(min(z) / max(z)) and line.cosine == pytest.approx(1) and line.rank == pytest.approx(1)
    drawn = embeddings.isotropy(np.random.default_rng(0).normal(size=(20_000, 4)))
    assert drawn.partition > 0.9 and abs(drawn.cosine) < 1e-2 and drawn.rank > 3.99
    far = embeddings.isotropy(np.random.default_rng(0).normal(size=(20, 4)) * 1e4)
    assert 0 <= far.partition < 1e-6 and math.isfinite(far.cosine)
    with pytest.raises(ConfigError, match="isotropy is of at least two"):
        embeddings.isotropy(np.eye(3)[:1])


def test_the_spectrum_is_the_share_of_each_direction():
    table = np.array([[3, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]]) + 7.0
    np.testing.assert_allclose(embeddings.spectrum(table), [0.9, 0.1, 0], atol=1e-12)


def test_history_follows_the_table():
    draw = np.random.default_rng(0)
    tables = [(step, draw.normal(size=(12, 5))) for step in (10, 20)]
    found = embeddings.history(iter(tables), words=[3], analogies=[(0, 1, 2, 4)], count=2)
    assert found.steps == (10, 20) and found.kept[1] == pytest.approx(1)
    rows = [table / np.linalg.norm(table, axis=1)[:, None] for _, table in tables]
    assert found.kept[0] == pytest.approx((rows[0] * rows[1]).sum(-1).mean(), rel=1e-5)
    for number, (_, table) in enumerate(tables):
        assert found.isotropy[number] == embeddings.isotropy(table)
        assert found.neighbours[3][number].ids.tolist() == embeddings.neighbours(table, [3], count=2).ids[0].tolist()
        assert found.ranks[0, 1, 2, 4][number] == embeddings.analogy_rank(table, 0, 1, 2, 4)
    with pytest.raises(ConfigError, match="checkpoints are none"):
        embeddings.history([])


@pytest.mark.parametrize("count", [1, 5])
def test_the_purity_of_neighbours_is_that_of_the_exact_search(count):
    """And its chance is the mean over shuffled tables."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(-1, 4, 300)
    table = rng.normal(size=(300, 6)) + 3 * rng.normal(size=(5, 6))[kinds]
    known = np.flatnonzero(kinds >= 0)
    near = embeddings.neighbours(table[known], np.arange(len(known)), count=count).ids
    own = kinds[known]
    got = jax.jit(lambda table: neighbour_purity(table, kinds, count))(jnp.asarray(table, jnp.float32))
    assert float(got["neighbour_purity"].mean) == pytest.approx((own[near] == own[:, None]).mean(), abs=1e-6)
    shuffled = [(np.take(mixed, near) == mixed[:, None]).mean() for mixed in (rng.permutation(own) for _ in range(400))]
    assert float(got["neighbour_chance"].mean) == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 20)
    assert got["neighbour_purity"].mean > got["neighbour_chance"].mean + 0.2
    assert float(neighbour_purity(jnp.ones((3, 2)), np.array([-1, 0, -1]), count)["neighbour_purity"].weight) == 0


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_the_embedding_table_is_what_tokens_enter_as(name):
    """Apart from positions, kinds and norms, which come after the lookup."""
    lm = llm_jax.load(GOLDEN / name)
    table = subject.embedding_table(lm.config, lm.params)
    tokens = jnp.arange(8)[None]

    def entering(params):
        seen = []

        def keep(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, Embedding) and context.method_name == "__call__":
                seen.append(out)
            return out

        with nn.intercept_methods(keep):
            lm.config.build(lm.vocabulary).apply({"params": params}, *([tokens] * (2 if lm.config.encodes else 1)))
        return seen[0]

    np.testing.assert_allclose(jax.jit(entering)(lm.params)[0], table[:8], rtol=1e-6)


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────
def schemes_of(position, **more):
    model = Decoder(**{"width": 8, "depth": 2, "attention": Attention(heads=2), "position": position} | more)
    params = random_parameters(model)
    return positions.schemes(model, params), params


def test_what_is_added_is_the_table():
    (scheme,), params = schemes_of(Learned(max_length=9))
    assert scheme.layers == (0, 1) and scheme.longest == 9
    np.testing.assert_allclose(positions.added(scheme, 7), params["position"]["embedding"][:7])
    (scheme,), _ = schemes_of(Sinusoidal(theta=100))
    waves = positions.added(scheme, 20)
    place = np.arange(20)
    np.testing.assert_allclose(waves[:, 4], np.sin(place / 100 ** (4 / 8)), atol=1e-5)
    rates = 100.0 ** (-np.arange(4) / 4)
    closed = np.cos((place[:, None] - place[None])[..., None] * rates).mean(-1)  # sines and cosines: of the distance alone
    np.testing.assert_allclose(positions.similarity(waves), closed, atol=1e-5)


def test_a_bias_by_distance_is_its_closed_form():
    (scheme,), _ = schemes_of(Alibi())
    distances, by_head = positions.by_distance(positions.biases(scheme, 5), causal=True)
    assert distances.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(by_head, -np.outer([2.0**-4, 2.0**-8], distances))
    (scheme,), params = schemes_of(T5Bias(buckets=4, max_distance=8))
    table = params["position"]["embedding"]
    _, by_head = positions.by_distance(positions.biases(scheme, 5), causal=True)
    np.testing.assert_allclose(by_head.T, table[jnp.array([0, 1, 2, 2, 3])])  # 2 · 4^(1/2) = 4 is where the last bucket begins
    both = Encoder(width=8, depth=1, attention=Attention(heads=2, mask=Bidirectional()), position=Alibi())
    (scheme,) = positions.schemes(both, random_parameters(both))
    distances, by_head = positions.by_distance(positions.biases(scheme, 5), causal=scheme.causal)
    assert distances.tolist() == [-2, -1, 0, 1, 2]
    np.testing.assert_allclose(by_head[0], -np.abs(distances) / 16)


def test_turning_is_that_of_scores_between_turned_vectors():
    (scheme,), _ = schemes_of(Rope(theta=50, fraction=0.5, scaling=LinearScaling(factor=2)), attention=Attention(heads=1))
    assert scheme.turned == 8
    found = positions.turning(scheme, 6)
    np.testing.assert_allclose(found.frequencies, [0.5, 0.5 * 50**-0.5])
    draw = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
    x_BLHK = np.broadcast_to(draw[:, None, None], (4000, 6, 1, 8))
    turned = np.asarray(scheme.position.rotate(jnp.asarray(x_BLHK), jnp.arange(6)[None]))[:, :, 0]
    shares = np.einsum("bk,blk->l", turned[:, 0], turned) / (draw**2).sum()
    np.testing.assert_allclose(found.attenuation, shares, atol=0.02)
    both = np.exp(1j * 0.5 * np.arange(6))
    expected = (np.abs(both) + np.abs(both + np.exp(1j * 0.5 * 50**-0.5 * np.arange(6)))) / 3
    np.testing.assert_allclose(found.bound, expected, atol=1e-9)


def test_schemes_are_where_layers_use_them():
    model = KINDS["pattern"]
    found = positions.schemes(model, random_parameters(model))
    assert [(scheme.name, scheme.layers) for scheme in found] == [("T5Bias", (0,)), ("Rope", (2,))]
    assert schemes_of(NoPosition())[0] == []
    recurrent = Decoder(width=8, depth=2, attention=LSTM(), position=NoPosition())
    assert positions.schemes(recurrent, random_parameters(recurrent)) == []
    both = KINDS["encoder-decoder"]
    assert [s.stack for s in positions.schemes(both, random_parameters(both))] == ["encoder", "decoder"]


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", picture[16:24])


def test_pictures_of_large_models_can_be_read():
    draw = np.random.default_rng(0)
    maps = [Map("", layer, "self", np.broadcast_to(draw.random((300, 300)), (1, 40, 300, 300))) for layer in range(12)]
    names = ["日$^$ and more"] * 300  # no glyph, and no formula
    pictures = [overview(maps, "t"), *heads(Map("", 0, "self", maps[0].weights[:, :17]), names, names, "t")]
    assert len(pictures) == 3
    shape = (49, 1, 300)
    lens = Lens(np.zeros((*shape, 2), int), np.full((*shape, 2), 0.5), np.ones(shape, int), *[np.ones(shape)] * 3)
    pictures += [lens_table(lens, {0: "$^$"}, names, names, np.ones(300)), lens_maps(lens, names, np.ones(300))]
    for figure in pictures:
        sizes = size(png(figure))
        assert max(sizes) <= 2000 and min(sizes) >= 150
    ticks = pictures[1].axes[12].get_yticklabels()
    assert len(ticks) == 15 and ticks[1].get_text() == "日$^$ … 20"
    assert [list(thinned(*given)) for given in ((3, 5), (5, 3), (4, 1))] == [[0, 1, 2], [0, 2, 4], [0]]


def test_a_bright_cell_survives_pooling():
    large = np.zeros((1000, 700))
    large[777, 333] = 1
    small = pooled(large, 100)
    assert small.shape == (100, 100) and small.max() == 1 and small.sum() == 1 and small[77, 47] == 1
    np.testing.assert_array_equal(pooled(large[:5, :5], 100), large[:5, :5])


# ── the page, and a notebook ─────────────────────────────────────────────────────────────────────────────────────────
def test_pieces_are_shown_and_found():
    words = [b"king", b" king", b" queen", b" ", b"\n", b"\xe2\x96", b"", "ü".encode()]

    class Words(Fitted):
        def encode(self, text):
            return np.array([words.index(piece) for piece in re.findall(rb" ?[a-z]+|\s", text.encode()) if piece in words])

    look = Subject("m", SMALL, 9, {}, Words(words, None, "x"))
    assert look.pieces(range(9)) == ["king", "␣king", "␣queen", "␣", "↵", "\\xe2\\x96", "#6", "ü", "#8"]
    assert [look.id(word) for word in ("king", " king", "queen", "ü")] == [0, 1, 2, 7]
    with pytest.raises(ConfigError, match="words must be single tokens of the model's, and 'king queen' is 'king' \\+ '␣queen'"):
        look.id("king queen")
    with pytest.raises(ConfigError, match="words must be ids below 9, for m has no tokenizer: got 'x'"):
        Subject("m", SMALL, 9, {}).id("x")


@pytest.mark.parametrize("name", ["encoder-decoder", "bert-sequence"])
def test_a_page_works_alone_and_says_what_it_leaves_out(name, tmp_path):
    model = KINDS.get(name)
    lm = LM(model, VOCABULARY, random_parameters(model), start=6) if model else llm_jax.load(GOLDEN / name)
    looking = lm.inspect([3, 4, 5], input=[7, 8] if lm.config.encodes else None)
    written = looking.write(tmp_path / "out", show=["attention", "depth", "positions"] if model else ())
    html = written.page.read_text()
    assert "#6 #3 #4</pre>" in html if model else "#3 #4 #5</pre>" in html
    assert set(written.left_out) == ({"lens"} if name == "bert-sequence" else set())
    assert all(escape(why) in html for why in written.left_out.values())
    files = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert files == {file for view in written.views for file in view.figures} and len(files) >= 5
    assert html.count("data:image/png;base64,") == len(files) and not re.search(r"(src|href)=['\"]?(http|[a-z_0-9]+\.)", html)
    assert looking.depth()._repr_html_().startswith("<section id=depth>")


def test_what_a_model_has_not_is_left_out_or_refused(tmp_path):
    model = Decoder(**TINY, attention=LSTM(), position=NoPosition())
    lm = LM(model, VOCABULARY, random_parameters(model), source="memory")
    written = lm.inspect([1, 2, 3]).write(tmp_path)
    assert [view.name for view in written.views] == ["lens", "depth", "embeddings"]
    assert written.left_out["attention"] == "memory mixes tokens by LSTM: there are no attention maps"
    assert set(lm.inspect().write(tmp_path).left_out) == {"attention", "lens", "depth", "positions"}
    attentive = LM(SMALL, VOCABULARY, small()[0], source="memory").inspect([1, 2, 3])
    classes = KINDS["grouped"].__class__(**TINY, attention=Attention(heads=2), head=SequenceClassifier(labels=2))
    for call, sentence in {
        lambda: lm.inspect([1, 2, 3]).write(tmp_path, show=["lens", "attention"]): "^memory mixes tokens by LSTM",
        lambda: lm.inspect().lens(): "text is missing",
        lambda: lm.inspect().write(tmp_path, show=["attentoin"]): "show names no view 'attentoin': did you mean attention",
        lambda: attentive.attention(layers=[2]): r"layers has \[2\], but those with attention are 0 … 1",
        lambda: attentive.embeddings(analogies=["1:2"]): "analogy must be a:b:c or, .* got '1:2'",
        lambda: LM(classes, VOCABULARY, random_parameters(classes)).inspect([1]).lens(): "head is SequenceClassifier",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            call()


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder of one arm whose checkpoints are all kept."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    base = Experiment(
        data=Data(corpus=TextFiles(path=str(folder / "text.txt")), sequence_length=16, batch_size=4),
        model=Decoder(width=8, depth=1, attention=Attention(heads=2)),
        train=Train(steps=6, log_every=2),
        evaluation=Evaluation(every=6, bytes=256),
        checkpoints=Checkpoints(every=2, keep_every=2),
    )
    ablation = Ablation(question="?", base=base, scientific=Arms({"plain": {}}), seeds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        Runner(ablation, WorkFolder(folder / "w"), note=print).run()
        yield folder / "w"


def test_every_checkpoint_of_a_trial_is_found_again(work):
    lm = llm_jax.load(work, arm="plain")
    tables = {step: llm_jax.load(work, arm="plain", step=step).params["embedding"]["embedding"] for step in (2, 4, 6)}
    np.testing.assert_array_equal(tables[6], lm.params["embedding"]["embedding"])
    assert not np.array_equal(tables[2], tables[4]) and not np.array_equal(tables[4], tables[6])
    near, even, past = lm.inspect().embeddings(words=["t", "q"], analogies=["a:b:c:d"]).numbers
    assert past.steps == (2, 4, 6) and past.isotropy[-1] == even
    for step, one in zip(past.steps, past.isotropy, strict=True):
        assert one == embeddings.isotropy(np.asarray(tables[step]) * np.float32(8**0.5))
    assert past.neighbours[ord("t")][-1].ids.tolist() == near.ids[0, :5].tolist()
    with pytest.raises(ConfigError, match=r"step is 3, but the checkpoints of .* that were kept are of 2, 4, 6"):
        llm_jax.load(work, step=3)
    assert Bytes().fit(None, ".").fingerprint == lm.tokenizer.fingerprint
