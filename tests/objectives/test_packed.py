"""Documents packed into a row cost what they cost alone, and pull the parameters where they pull alone: for every objective.

In float64, so that a token that sees another document, or a wrong position, stands out from rounding.
"""

from dataclasses import fields as fields_of
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.types import Batch
from llm_jax.data.packing import FirstFit, Padded
from llm_jax.data.store import Tokens
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.model import initial_parameters
from llm_jax.models.predict import predict
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional, Prefix
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Learned
from llm_jax.objectives.denoising import UL2, SpanCorruption
from llm_jax.objectives.infilling import FillInTheMiddle
from llm_jax.objectives.masked import MaskedLM
from llm_jax.objectives.next_token import NextToken
from llm_jax.objectives.prefix_lm import PrefixLM
from llm_jax.train.check import compiled, moved, variant
from tests.objectives.posed import packed, pose, tokenizer

SMALL = {"width": 8, "depth": 1, "position": Learned(max_length=80)}  # not distances alone, as Rope() would
SIZE, DOCUMENTS = 12, 3  # all of one size, so that what is alone needs no padding and one program
TWO_WAYS = Attention(heads=2, mask=Bidirectional())
DECODER = Decoder(**SMALL, attention=Attention(heads=2))
SEEN = Decoder(**SMALL, attention=Attention(heads=2, mask=Prefix()))
PAIR = EncoderDecoder(encoder=Stack(**SMALL, attention=TWO_WAYS), decoder=Stack(**SMALL, attention=Attention(heads=2)))
CASES = {
    "causal": (NextToken(), DECODER),
    "masked": (MaskedLM(rate=0.4), Encoder(**SMALL, attention=TWO_WAYS)),
    "spans": (SpanCorruption(rate=0.4, mean_length=2.0, sentinels=8), PAIR),
    "spans in a decoder": (SpanCorruption(rate=0.4, mean_length=2.0, sentinels=8), SEEN),
    "middles": (FillInTheMiddle(rate=1.0), DECODER),
    "prefixes": (PrefixLM(), SEEN),
    "mixture": (UL2(sentinels=8), PAIR),
}
FOR_INPUTS = {"inputs": "input_segments", "input_segments": "input_segments", "input_positions": "input_segments"}
SLOW = ("mixture", "spans in a decoder", "middles", "prefixes")


def alone(posed: Batch, *, padded: bool) -> Batch:
    """Each document of the one row in a row of its own; padded: some are longer than others."""
    fields = {one.name: getattr(posed, one.name) for one in fields_of(Batch) if getattr(posed, one.name) is not None}
    rows = {name: [] for name in fields}
    for document in range(DOCUMENTS):
        for name, value in fields.items():
            rows[name].append(value[0][getattr(posed, FOR_INPUTS.get(name, "segments"))[0] == document])
    if not padded:
        return Batch(
            **{name: jnp.asarray(np.stack(value)) for name, value in rows.items() if "seg" not in name and "pos" not in name}
        )
    longest = {name: max(map(len, value)) for name, value in rows.items()}

    def pad(name, value):
        return np.pad(value, (0, longest[name] - len(value)), constant_values=-1 if "segments" in name else 0)

    return Batch(**{name: jnp.asarray(np.stack([pad(name, one) for one in value])) for name, value in rows.items()})


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_packed_is_one_by_one(name):
    objective, model = CASES[name]
    objective.check(model)
    posed = pose(objective, packed((SIZE,) * DOCUMENTS), model=model)
    each, vocabulary = alone(posed, padded=name == "mixture"), tokenizer(objective).vocabulary
    with jax.enable_x64(True):
        exact = variant(model, layers="unrolled")
        params = compiled(partial(initial_parameters, exact, vocabulary))(jax.random.key(0))
        params = jax.tree.map(partial(moved, np.random.default_rng(0)), params)
        more = {"model": exact, "rng": jax.random.key(1), "byte_lengths": jnp.ones(vocabulary, jnp.int32), "train": True}
        total = lambda params, batch: objective.loss(  # noqa: E731
            partial(predict, exact, vocabulary, train=True), params, batch, **more
        )[0]
        sums = compiled(jax.value_and_grad(lambda params, batch: ((t := total(params, batch)).total, t.weight), has_aux=True))
        (loss, weight), grads = sums(params, jax.tree.map(jnp.asarray, posed))
        (loss_alone, weight_alone), grads_alone = sums(params, each)
    assert weight == weight_alone > DOCUMENTS
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-8)
    flat, other = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (grads, grads_alone))
    # norms and angles are computed in float32: what that leaves is 1e-6 of the gradient
    assert np.linalg.norm(flat - other) < 1e-5 * np.linalg.norm(other)
    assert np.abs(flat - other).max() < 1e-5 * np.abs(other).max()


def test_a_store_costs_the_same_first_fit_and_padded():
    sizes, length = np.array([5, 12, 3, 9, 7, 12, 2, 30]), 12
    ids = np.random.default_rng(0).integers(0, 20, sizes.sum()).astype(np.int32)
    store = Tokens(ids, np.cumsum(sizes) - sizes, None)
    exact, objective = variant(DECODER, layers="unrolled"), NextToken()
    network = compiled(partial(predict, exact, 20, train=False))
    with jax.enable_x64(True):
        params = jax.tree.map(
            partial(moved, np.random.default_rng(0)), compiled(partial(initial_parameters, exact, 20))(jax.random.key(0))
        )
        sums = []
        for packing in (FirstFit(), Padded()):
            rows = packing.rows(store, length, "")
            batch = jax.tree.map(jnp.asarray, rows.gather(np.arange(len(rows))))
            more = {"model": exact, "rng": jax.random.key(1), "byte_lengths": jnp.ones(20, jnp.int32), "train": False}
            scores = objective.loss(network, params, batch, **more)[1]
            sums.append((len(rows), scores["loss"]))
    (packed_rows, first), (padded_rows, second) = sums
    assert packed_rows < padded_rows and first.weight == second.weight == sizes.sum() - len(sizes)
    np.testing.assert_allclose(first.total, second.total, rtol=1e-8)
