"""Generation with a cache, against the whole pass over what was generated: the same tokens and the same probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.core.sharding import unbox
from llm_jax.infer import decode
from llm_jax.infer.decode import generate, roomy
from llm_jax.infer.rows import pad, rounded
from llm_jax.infer.sampling import Greedy, Sample
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel, MultiToken, TokenClassifier
from llm_jax.models.model import abstract_parameters
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional, Chunked, Prefix, SlidingWindow
from llm_jax.nn.dispatch import Capacity
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Gated, NoFeedForward
from llm_jax.nn.latent import MLA
from llm_jax.nn.mixer import NoMixing
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias
from llm_jax.nn.recurrent import LSTM
from llm_jax.nn.residual import HyperConnections
from llm_jax.nn.rope import YarnScaling
from llm_jax.nn.routing import ExpertChoice

V, NEW = 13, 6
ROPE = Rope(theta=100.0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8]]
MHA, GQA, MLA_ = Attention(heads=4), Attention(heads=4, kv_heads=2, bias=True), MLA(heads=2, kv_rank=6, nope_dim=4, rope_dim=4)


def model(attention=GQA, position=ROPE, **more):
    head = LanguageModel(tied=False)
    return Decoder(**({"width": 16, "depth": 1, "attention": attention, "position": position, "head": head} | more))


def seq2seq(position, **more):
    both = {"width": 16, "depth": 1, "ffn": Gated()}
    encoder = Stack(attention=Attention(heads=2, mask=Bidirectional()), position=T5Bias(bidirectional=True), **both)
    decoder = Stack(attention=GQA, position=position, **both)
    return EncoderDecoder(encoder=encoder, decoder=decoder, head=LanguageModel(tied=False), **more)


TABLE = {
    "mha-rope": model(MHA, depth=2),
    "gqa-alibi": model(position=Alibi()),
    "mqa-t5": model(Attention(heads=4, kv_heads=1, qk_norm=RMSNorm()), T5Bias(buckets=8, max_distance=12)),
    "gqa-learned": model(position=Learned(max_length=len(PROMPTS[0]) + NEW)),
    "gqa-sinusoidal": model(position=Sinusoidal()),
    "none": model(position=NoPosition()),
    "sinks-cap": model(Attention(heads=4, sinks=True, soft_cap=2.0), head=LanguageModel(soft_cap=3.0)),
    "yarn": model(position=Rope(theta=100.0, scaling=YarnScaling(factor=2.0, original_length=8))),
    "mla-rope": model(MLA_),
    "mla-q-alibi": model(MLA(heads=2, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=4), Alibi()),
    "window": model(Attention(heads=4, mask=SlidingWindow(3, sinks=1))),
    "chunked": model(Attention(heads=4, mask=Chunked(4))),
    "prefix": model(Attention(heads=4, mask=Prefix())),
    "prefix-mla": model(MLA(heads=2, kv_rank=6, nope_dim=4, rope_dim=4, mask=Prefix())),
    "splash": model(Attention(heads=4, backend="splash")),  # which has no cached call, nor has cuDNN here any call
    "cudnn": model(Attention(heads=4, backend="cudnn")),
    "splash-mla": model(MLA(heads=2, kv_rank=6, nope_dim=4, rope_dim=4, backend="splash")),
    "blockwise": model(Attention(heads=4, backend="blockwise")),
    "lstm": model(LSTM(), NoPosition(), ffn=NoFeedForward()),
    "lstm-and-attention": model(LSTM(units=12), pattern=(Layer(), Layer(attention=MHA)), depth=2),
    "local-global-scanned": model(
        depth=5, layers="scanned", first=(Layer(),), pattern=(Layer(attention=Attention(heads=2, mask=SlidingWindow(4))), Layer())
    ),
    "moe": model(ffn=MoE(experts=4), embedding=Embed(norm=RMSNorm())),
    "moe-capacity": model(ffn=MoE(experts=4, dispatch=Capacity(factor=0.5, priority="position"))),
    "hyper-parallel": model(residual=HyperConnections()),
    "ahead": model(head=MultiToken(), placement="post"),
    "no-mixing": model(NoMixing(), NoPosition()),
    "encoder-decoder-t5": seq2seq(T5Bias()),
    "encoder-decoder-rope": seq2seq(Rope(), shared_embedding=False),
}


SEEDS = {"ahead": 1, "encoder-decoder-t5": 1}  # with others these say the same of every prompt


def parameters(config, seed=0):
    """Such that what is said depends on what was read."""
    draw = np.random.default_rng(seed)

    def one(path, leaf):
        noise = draw.normal(size=leaf.shape).astype(np.float32)
        # beside large embeddings what was read before would hardly count
        return 1 + 0.2 * noise if path[-1].key == "scale" else noise * (0.1 if path[-1].key == "embedding" else 0.6)

    return jax.tree_util.tree_map_with_path(one, unbox(abstract_parameters(config, V)))


def whole_pass(config, params, rows, inputs):
    """Logits `[B, L, V]` of rows padded on the right, without a cache."""
    network, width = config.build(V), max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    if inputs:
        longest = max(map(len, inputs))
        read = np.array([row + [0] * (longest - len(row)) for row in inputs])
        real = np.array([[i < len(row) for i in range(longest)] for row in inputs])
        return network.apply({"params": params}, read, tokens, input_segments_BM=jnp.asarray(real) - 1)
    prefix = jnp.asarray([[i < len(row) - NEW for i in range(width)] for row in rows]) if config.prefix_mask else None
    return jax.jit(lambda p: network.apply({"params": p}, tokens, prefix_BL=prefix))(params)


@pytest.mark.parametrize("name", TABLE)
def test_cached_generation_is_the_argmax_of_the_whole_pass(name):
    config = TABLE[name]
    named = getattr(getattr(config, "attention", None), "backend", "auto") != "auto"
    plain = override(config, {"attention.backend": "auto"}) if named else config
    params = parameters(plain, SEEDS.get(name, 0))
    starts, inputs = ([[1]] * 3, PROMPTS) if config.encodes else (PROMPTS, None)
    found = generate(config, V, params, starts, max_new_tokens=NEW, key=jax.random.key(0), inputs=inputs)
    assert found.tokens.shape == (3, NEW) and (found.count == NEW).all()
    rows = [[*start, *map(int, new)] for start, new in zip(starts, found.tokens, strict=True)]
    logits = np.asarray(whole_pass(roomy(plain), params, rows, inputs))
    for start, new, log_p, said in zip(starts, found.tokens, found.log_p, logits, strict=True):
        said = said[len(start) - 1 : len(start) - 1 + NEW]
        np.testing.assert_array_equal(said.argmax(-1), new)
        np.testing.assert_allclose(log_p, np.asarray(jax.nn.log_softmax(said))[np.arange(NEW), new], atol=2e-5)
    assert len({tuple(new) for new in found.tokens}) > 1, "rows that all say the same prove little"


# ── one model, looked at closely ─────────────────────────────────────────────────────────────────────────────────────
CLOSE = TABLE["gqa-learned"]


def tokens(prompts, config=CLOSE, new=NEW, **more):
    found = generate(config, V, parameters(config), prompts, max_new_tokens=new, key=jax.random.key(0), **more)
    return [list(map(int, row[:count])) for row, count in zip(found.tokens, found.count, strict=True)]


def test_a_row_ends_after_an_end_token_and_the_others_go_on():
    free = tokens(PROMPTS)
    end = next(token for token in range(V) if 0 < sum(token in row[:-1] for row in free) < 3)
    assert tokens(PROMPTS, end=[V, end]) == [row[: row.index(end) + 1] if end in row else row for row in free]


def test_the_others_in_a_batch_and_their_number_change_nothing():
    way = Sample(temperature=1.5, top_k=8)
    assert tokens(PROMPTS, sampling=way)[0] == tokens(PROMPTS[:1], sampling=way)[0]
    assert tokens([*PROMPTS, [1], [2]])[:3] == tokens(PROMPTS)


def test_numbers_of_a_method_and_keys_share_a_program_and_few_shapes_are_compiled():
    tokens(PROMPTS, sampling=Sample(temperature=0.5, top_p=0.9))
    before = decode.extend._cache_size(), decode.prefill._cache_size()
    tokens([[2] * 8, [5], [6]], sampling=Sample(temperature=1.5, top_p=0.3))
    assert (decode.extend._cache_size(), decode.prefill._cache_size()) == before


def test_a_state_can_be_extended_again():
    config, params = TABLE["lstm"], parameters(TABLE["lstm"])
    rows = pad(PROMPTS, 12)
    state = decode.prefill(config, V, params, rows, slots=12 + 2 * NEW)
    ends = np.array([decode.NOBODY])
    parts = []
    for _ in range(2):
        found, state = decode.extend(
            config, V, params, state, jax.random.split(jax.random.key(0), len(state.length)), {}, ends, sampling=Greedy(), steps=NEW
        )
        parts.append(found.tokens)
    assert np.concatenate(parts, 1).tolist() == tokens(PROMPTS, config, 2 * NEW)


@pytest.mark.parametrize(
    "config, prompts, new, sentence",
    [
        (CLOSE, PROMPTS, NEW + 1, "a prompt of 9 tokens with max_new_tokens=7 takes 16 tokens.* only 15 positions"),
        (CLOSE, [[]], NEW, "prompt is empty"),
        (CLOSE, PROMPTS, 0, "max_new_tokens must be >= 1, got 0"),
        (Encoder(width=8, depth=1), PROMPTS, NEW, "model is not causal"),
        (model(ffn=MoE(router=ExpertChoice())), PROMPTS, NEW, "model is not causal"),
        (model(head=TokenClassifier()), PROMPTS, NEW, "model.head is TokenClassifier.* no token ids"),
    ],
    ids=["longer than the table", "empty", "nothing new", "encoder", "experts choose", "classifier"],
)
def test_what_cannot_be_generated_is_refused_in_a_sentence(config, prompts, new, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        generate(config, V, {}, prompts, max_new_tokens=new, key=jax.random.key(0))
    assert "\n" not in str(raised.value)


def test_rows_are_padded_to_few_lengths_and_by_a_quarter_at_most():
    lengths = [rounded(n) for n in range(1, 4097)]
    assert len(set(lengths)) <= 4 * 9 and all(n <= padded for n, padded in enumerate(lengths, 1))
    assert all(padded <= 1.25 * n for n, padded in enumerate(lengths, 1) if n > 64)
    assert rounded(90, at_most=92) == 92 and rounded(90, at_most=None) == 96


def test_a_row_halts_when_it_is_asked_to_and_draws_what_it_would_have_drawn(monkeypatch):
    monkeypatch.setattr(decode, "EVERY", 2)
    config = TABLE["mha-rope"]
    for way in (Greedy(), Sample(temperature=1.5)):
        free = tokens(PROMPTS, config, new=7, sampling=way)
        assert tokens(PROMPTS, config, new=7, sampling=way, halts=lambda row, ids: False) == free
        asked = []

        def halts(row, ids, asked=asked):
            asked.append((row, len(ids)))
            return row == 1 and len(ids) >= 4

        cut = tokens(PROMPTS, config, new=7, sampling=way, halts=halts)
        assert cut == [free[0], free[1][:4], free[2]]
        assert (1, 2) in asked and (1, 6) not in asked
        end = free[0][2]
        ended = tokens(PROMPTS, config, new=7, sampling=way, halts=lambda row, ids: False, end=[end])
        assert ended == tokens(PROMPTS, config, new=7, sampling=way, end=[end]) and ended[0] == free[0][: free[0].index(end) + 1]


def test_rows_that_programs_have_room_for_change_nothing():
    config = TABLE["gqa-alibi"]
    alone = [tokens([prompt], config, width=8)[0] for prompt in PROMPTS]
    assert tokens(PROMPTS, config, width=8) == alone == tokens(PROMPTS, config)
