"""Scores of rows: those of the whole logits, and to the last bit the same however rows come together."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.core.platform import traits
from llm_jax.core.sharding import unbox
from llm_jax.infer import forward
from llm_jax.infer.scoring import Request, Scorer, rows_of
from llm_jax.io.pretrained import shardings
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel, MultiToken
from llm_jax.models.model import abstract_parameters
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional, Prefix
from llm_jax.nn.dispatch import Capacity
from llm_jax.nn.kernels import blocks
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Learned, Rope, T5Bias

V = 29
PLAIN = Decoder(width=16, depth=1, attention=Attention(heads=2), position=Rope())
MODELS = {
    "rope": PLAIN,
    "learned": dataclasses.replace(PLAIN, position=Learned(max_length=40)),
    "bfloat16": dataclasses.replace(PLAIN, precision=Precision(compute="bfloat16")),
    "experts": dataclasses.replace(PLAIN, ffn=MoE(experts=4)),
    "experts that are full": dataclasses.replace(PLAIN, ffn=MoE(experts=4, dispatch=Capacity(factor=0.5, over="batch"))),
    "prefix": dataclasses.replace(PLAIN, attention=Attention(heads=2, mask=Prefix())),
    "ahead": dataclasses.replace(PLAIN, head=MultiToken()),
    "encoder-decoder": EncoderDecoder(
        encoder=Stack(width=16, depth=1, attention=Attention(heads=2, mask=Bidirectional()), position=T5Bias(bidirectional=True)),
        decoder=Stack(width=16, depth=1, attention=Attention(heads=2), position=T5Bias()),
        head=LanguageModel(tied=False),
    ),
}


def parameters(config, vocabulary=V):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: draw.normal(size=x.shape).astype(np.float32) * 0.5, unbox(abstract_parameters(config, vocabulary))
    )


def requests(config, count=24, longest=41):
    draw = np.random.default_rng(1)
    lengths = draw.integers(2, longest + 1, count).tolist()
    rows = [draw.integers(0, V, length).tolist() for length in lengths]
    read = [draw.integers(0, V, length).tolist() if config.encodes else [] for length in reversed(lengths)]
    return [Request(row, int(draw.integers(1, len(row))), r) for row, r in zip(rows, read, strict=True)]


def scored(config, params, given, size=None, **more):
    """By calls of `size` requests each."""
    found = {}
    for begin in range(0, len(given), size or len(given)):
        part = Scorer(config, V, params, **more)(given[begin : begin + (size or len(given))])
        found |= {begin + number: (scores.log_p, scores.greedy) for number, scores in part}
    return [found[number] for number in range(len(given))]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(name):
    config = MODELS[name]
    params, given = parameters(config), requests(config)
    at_once = scored(config, params, given)
    order = np.random.default_rng(2).permutation(len(given)).tolist()
    turned = scored(config, params, [given[i] for i in order])
    assert [at_once[i] for i in order] == turned
    for size in (1, 3, 8):
        assert scored(config, params, given, size) == at_once, size
    assert len(set(at_once)) == len(at_once)


def test_the_shape_of_a_program_follows_from_the_length_alone(monkeypatch):
    shapes = []
    score = forward.score

    def noted(model, vocabulary, params, rows, *more):
        shapes.append(rows.tokens.shape)
        return score(model, vocabulary, params, rows, *more)

    monkeypatch.setattr(forward, "score", noted)
    for size in (1, 3, 24):
        scored(PLAIN, parameters(PLAIN), requests(PLAIN), size)
    assert set(shapes) == {(traits().scored_at_once // 16, 16), (traits().scored_at_once // 32, 32), (rows_of(PLAIN, 48, 512), 48)}
    assert [rows_of(PLAIN, length, 512) for length in (16, 48, 512, 1024)] == [32, 8, 1, 1]
    assert rows_of(MODELS["experts"], 16, 512) == 1


@pytest.mark.parametrize("name", ["rope", "learned", "ahead", "encoder-decoder"])
def test_scores_are_sums_over_the_logits_of_the_row_alone(name):
    config = MODELS[name]
    params, given = parameters(config), requests(config, 3)
    network = jax.jit(lambda params, *inputs: config.build(V).apply({"params": params}, *inputs))
    for request, (log_p, greedy) in zip(given, scored(config, params, given), strict=True):
        inputs = ([request.read], [request.row[:-1]]) if config.encodes else ([request.row[:-1]],)
        logits = np.asarray(network(params, *map(np.array, inputs)), np.float64)[0]
        all_log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places, targets = np.arange(request.first - 1, len(request.row) - 1), request.row[request.first :]
        assert log_p == pytest.approx(all_log_p[places, targets].sum(), rel=1e-6, abs=2e-5)
        assert greedy == (all_log_p[places].argmax(-1) == targets).all()


def test_a_greedy_continuation_is_known_for_one():
    params, row = parameters(PLAIN), [3, 1, 4]
    network = jax.jit(lambda params, tokens: PLAIN.build(V).apply({"params": params}, tokens))
    for _ in range(5):
        logits = network(params, np.array([row + [0] * (8 - len(row))]))
        row.append(int(logits[0, len(row) - 1].argmax()))
    other = [*row[:-1], (row[-1] + 1) % V]
    given = [Request(row, 3), Request(other, 3), Request(row, 1)]
    assert [greedy for _, greedy in scored(PLAIN, params, given)][:2] == [True, False]


def test_where_logits_are_many_they_are_made_by_blocks(monkeypatch):
    params, given = parameters(PLAIN), requests(PLAIN)
    whole = scored(PLAIN, params, given)
    monkeypatch.setattr(blocks, "block_count", lambda tokens, vocabulary: 5)
    jax.clear_caches()
    text = str(jax.make_jaxpr(lambda p: forward.score(PLAIN, V, p, *_example()))(params))
    cut = scored(PLAIN, params, given)
    spread = scored(PLAIN, jax.device_put(params, shardings(PLAIN, V, Mesh(data=2, fsdp=4))), given)
    jax.clear_caches()
    assert spread == cut
    np.testing.assert_allclose([x for x, _ in cut], [x for x, _ in whole], rtol=1e-5)
    assert [x for _, x in cut] == [x for _, x in whole] and "scan" in text


def _example():
    rows = forward.Rows(np.zeros((4, 16), np.int32), np.full(4, 16, np.int32))
    return rows, np.zeros((4, 16), np.int32), np.ones(4, np.int32)


@pytest.mark.parametrize("mesh", [Mesh(data=-1), Mesh(data=2, fsdp=2, tensor=2)])
def test_devices_share_the_rows(mesh):
    params, given = parameters(PLAIN), requests(PLAIN)
    alone = scored(PLAIN, params, given)
    spread = scored(PLAIN, jax.device_put(params, shardings(PLAIN, V, mesh)), given)
    np.testing.assert_allclose([x for x, _ in spread], [x for x, _ in alone], rtol=1e-5)
    if mesh.tensor == 1:
        assert spread == alone


def test_requests_are_read_as_they_are_scored():
    """What is held does not grow with what there is: of an endless stream the first scores are there."""
    draw = np.random.default_rng(0)
    endless = (Request(draw.integers(0, V, 33).tolist(), 1) for _ in itertools.count())
    first = list(itertools.islice(Scorer(PLAIN, V, parameters(PLAIN), tokens=64)(endless), 5))
    assert [number for number, _ in first] == [0, 1, 2, 3, 4]


def test_more_than_the_positions_is_refused():
    config = MODELS["learned"]
    assert len(scored(config, parameters(config), [Request([1] * 41, 40)])) == 1
    with pytest.raises(ConfigError, match="a row takes 41 tokens, but the model has learned only 40 positions"):
        scored(config, parameters(config), [Request([1] * 42, 40)])
