"""BERT's masking: its rates within sampling error, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from llm_jax.core.config import ConfigError
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import TokenClassifier
from llm_jax.objectives.masked import MaskedLM
from tests.objectives.posed import chi_squared, packed, pose, whole

MASK = 257


def test_the_rates_are_bert_s():
    batch = whole(512, rows=64)
    posed, before = pose(MaskedLM(), batch, model=Encoder()), np.asarray(batch.tokens)
    chosen = posed.weights > 0
    assert binomtest(int(chosen.sum()), chosen.size, 0.15).pvalue > 1e-3
    np.testing.assert_array_equal(posed.targets, before)
    np.testing.assert_array_equal(posed.tokens[~chosen], before[~chosen])
    now, was = posed.tokens[chosen], before[chosen]
    hidden, kept = now == MASK, now == was
    others = 257  # ids that a random one is drawn from, the mask is not among them
    fates = [hidden.sum(), kept.sum(), (~hidden & ~kept).sum()]
    assert chi_squared(fates, chosen.sum() * np.array([0.8, 0.1 + 0.1 / others, 0.1 - 0.1 / others])) > 1e-3
    drawn = now[~hidden & ~kept]
    assert chi_squared(np.bincount(drawn // 32, minlength=8)[:8], len(drawn) / 8 * np.ones(8) * (drawn < 256).mean()) > 1e-3
    by_place = chosen.sum(0)  # no place is preferred
    assert chi_squared(by_place, np.full(512, by_place.mean())) > 1e-3


def test_other_rates_and_the_end_of_a_document():
    batch = packed([30, 2], rows=200)
    ends = np.asarray(batch.tokens).copy()
    ends[:, 29] = 256
    posed = pose(MaskedLM(rate=0.5, masked=1.0, random=0.0), replace(batch, tokens=ends), model=Encoder())
    chosen = posed.weights > 0
    assert not chosen[:, 29].any(), "the end of a document is never hidden"
    assert binomtest(int(chosen.sum()), 200 * 31, 0.5).pvalue > 1e-3
    assert (posed.tokens[chosen] == MASK).all()


def test_rows_without_weight_and_padding_are_not_asked_for():
    batch = packed([10, 6], rows=2)
    weights = np.asarray(batch.weights).copy()
    weights[0] = 0
    segments = np.asarray(batch.segments).copy()
    segments[1, 10:] = -1
    posed = pose(MaskedLM(rate=0.9), replace(batch, weights=weights, segments=segments), model=Encoder())
    assert posed.weights[0].sum() == 0 and posed.weights[1, :10].sum() > 0 and posed.weights[1, 10:].sum() == 0


@pytest.mark.parametrize(
    "objective, model, sentence",
    [
        (MaskedLM(), Decoder(), r"model.attention shows a token none that come later, .*: take Encoder\(\)"),
        (MaskedLM(), EncoderDecoder(), r"objective has no input for an encoder: take SpanCorruption\(\)"),
        (MaskedLM(), Encoder(head=TokenClassifier(labels=2)), r"model.head must score token ids"),
    ],
)
def test_models_that_cannot_be_trained_for_it(objective, model, sentence):
    with pytest.raises(ConfigError, match=sentence):
        objective.check(model)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"rate": 0.0}, r"rate must be in \(0, 1\), got 0.0"),
        ({"masked": 1.5}, r"masked must be in \[0, 1\], got 1.5"),
        ({"masked": 0.9, "random": 0.2}, r"random must be at most 1 - masked = 0.1, got 0.2"),
        ({"after": 3}, r"after is of what comes after a token"),
    ],
)
def test_rates_that_make_no_sense(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MaskedLM(**fields)
