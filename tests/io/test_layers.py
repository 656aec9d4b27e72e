"""Layers that stand alone in a checkpoint and are stacked in a program, and the reverse, with what an optimizer keeps of them."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import nameless
from llm_jax.io import layers
from llm_jax.lab.components import Attention, Decoder, EncoderDecoder, Gated, Layer, Stack
from llm_jax.lab.experiment import Experiment
from llm_jax.models.model import stack_layers, unstack_layers
from llm_jax.objectives.continuation import Continuation
from llm_jax.objectives.next_token import NextToken
from llm_jax.optim.optimizers import Adafactor, AdamW, Lion, Muon, ScheduleFreeAdamW
from llm_jax.train.pretrain import Train, trial

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
MODELS = {
    "alike": Decoder(width=8, depth=3, attention=Attention(heads=2)),
    "pattern": Decoder(
        width=8,
        depth=6,
        attention=Attention(heads=2),
        first=(Layer(ffn=Gated()),),
        pattern=(Layer(), Layer(attention=Attention(heads=4))),
    ),
    "two stacks": EncoderDecoder(encoder=Stack(width=8, depth=2), decoder=Stack(width=8, depth=3)),
}


def state(model, optimizer, form):
    """Shapes of a population of two."""
    given = {"optimizer": optimizer, "train": Train(average=0.9), "objective": Continuation() if model.encodes else NextToken()}
    experiment = replace(Experiment(), model=model.with_layers(form), **given)
    one = jax.eval_shape(trial(experiment, nameless(11)).init, {"seed": jax.ShapeDtypeStruct((), np.int32)})
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=HERE), one)


@pytest.mark.parametrize("optimizer", [AdamW(), Muon(), Lion(), ScheduleFreeAdamW()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_asked_for_is_what_is_stored(model, optimizer):
    scanned, unrolled = (state(model, optimizer, form) for form in ("scanned", "unrolled"))
    assert layers.as_stored(scanned, unrolled)[0] == unrolled
    assert layers.as_stored(unrolled, scanned)[0] == scanned
    assert layers.as_stored(scanned, scanned)[0] is scanned


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_numbers_stay_with_their_layer(model):
    rng = np.random.default_rng(0)
    scanned, unrolled = (state(model, AdamW(), form).params for form in ("scanned", "unrolled"))
    stored = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), unrolled)
    got = layers.as_stored(scanned, unrolled)[1](stored)
    back = layers.as_stored(unrolled, scanned)[1](got)
    for member in range(2):
        mine, again = (jax.tree.map(lambda x, at=member: np.asarray(x[at]), tree) for tree in (got, back))
        own, config = jax.tree.map(lambda x, at=member: x[at], stored), model.with_layers("scanned")
        jax.tree.map(np.testing.assert_array_equal, mine, stack_layers(own, config))
        jax.tree.map(np.testing.assert_array_equal, again, unstack_layers(stack_layers(own, config), config))


def test_what_belongs_to_no_layer_is_a_sentence():
    model = replace(MODELS["alike"], width=128)  # whose matrices Adafactor keeps in factors, and a number in place of each
    scanned, unrolled = (state(model, Adafactor(), form) for form in ("scanned", "unrolled"))
    for ways in ((scanned, unrolled), (unrolled, scanned)):
        with pytest.raises(ConfigError, match="the optimizer's state keeps numbers of several layers together"):
            layers.as_stored(*ways)
