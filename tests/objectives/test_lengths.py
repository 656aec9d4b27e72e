"""How long an objective says the rows are that it makes is how long they are."""

import jax
import pytest

from llm_jax.core.types import Batch
from llm_jax.objectives.continuation import Continuation
from llm_jax.objectives.denoising import UL2, SpanCorruption
from llm_jax.objectives.infilling import FillInTheMiddle
from llm_jax.objectives.masked import MaskedLM
from llm_jax.objectives.next_token import NextToken
from llm_jax.objectives.prefix_lm import PrefixLM
from tests.objectives.posed import DECODER, PAIR, packed, tokenizer, whole

BOTH = SpanCorruption(), UL2(), PrefixLM(), Continuation(fraction=0.3)
CASES = [(objective, model) for objective in BOTH for model in (DECODER, PAIR)]
CASES += [(objective, DECODER) for objective in (NextToken(), MaskedLM(), FillInTheMiddle())]


def read(objective, model, batch: Batch) -> Batch:
    """The shapes of what the model is given."""
    seen = []

    def apply(params, batch, rng):
        seen.append(batch)
        raise StopIteration

    def loss(batch, keys_B):
        posed = objective.pose(batch, keys_B, model=model, tokens=tokenizer(objective))
        return objective.loss(apply, None, posed, model=model, rng=None, byte_lengths=None, train=True)

    with pytest.raises(StopIteration):
        jax.eval_shape(loss, batch, jax.random.split(jax.random.key(0), batch.tokens.shape[0]))
    return seen[0]


@pytest.mark.parametrize("sizes", [(40,), (23, 9, 30)], ids=["whole", "packed"])
@pytest.mark.parametrize("objective, model", CASES, ids=lambda x: type(x).__name__)
def test_they_are_as_long_as_is_said(objective, model, sizes):
    batch = whole(*sizes, rows=2) if len(sizes) == 1 else packed(sizes, rows=2)
    given = read(objective, model, batch)
    lengths = given.tokens.shape[1], 0 if given.inputs is None else given.inputs.shape[1]
    assert lengths == objective.lengths(sum(sizes), model=model, packed=len(sizes) > 1)
